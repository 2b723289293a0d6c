"""Comparing outputs: how far apart they may be, and an assert that says where and by how much they are."""

from typing import Any, Literal

import numpy as np

from cumoe.door.arrays import admit, cupy
from cumoe.door.checks import check_word

TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}
"""Largest relative Frobenius distance of a layer's output from float64 on the same inputs, by dtype."""

FLOOR = {"float32": 1e-36, "float16": 2.0**-22, "bfloat16": 1e-36}
"""What an element may be off where numbers are so small that the dtype has no digits left: a few subnormal steps."""

MAX_LISTED = 8


def relative_error(got: Any, expected: Any, floor: float = 0.0, unit: float = 0.0) -> float:
    r"""Return the relative Frobenius distance of two arrays of any library.

    ::

        max(0, ||got - expected|| - floor sqrt(size)) / max(||expected||, unit sqrt(size))

    Parameters
    ----------
    got, expected : array
        Of the same shape; NumPy, CuPy, or anything that speaks DLPack.
    floor : float
        What each element may be off for nothing.
    unit : float
        The size of the terms that an element is a sum of, where they may cancel.

    Returns
    -------
    float
        0 for equal arrays, also of zeros; infinity where a NaN or an unequal infinity appears.

    Raises
    ------
    AssertionError
        If the shapes differ.
    TypeError
        If something is no array.
    """
    got, expected = _host("got", got), _host("expected", expected)
    assert got.shape == expected.shape, f"shapes differ: got {got.shape}, expected {expected.shape}"
    return _distance(got, expected, floor, unit)


def assert_close(
    got: Any,
    expected: Any,
    dtype: Any = None,
    what: str = "",
    unit: float = 0.0,
    *,
    tolerance: float | None = None,
    nans: Literal["forbidden", "matching"] = "forbidden",
) -> None:
    """Fail unless two outputs agree; say where they do not, and by how much.

    Parameters
    ----------
    got, expected : (num_tokens, ...) array
        NumPy, CuPy, or anything that speaks DLPack. `expected` is best in float64, from `cumoe.reference`.
    dtype : dtype, optional
        What `got` was computed in; default: its own.
    what : str
        What the message begins with.
    unit : float
        As in `relative_error`: results below it are what is left where terms of that size cancel, and with few of them
        nothing averages that out.
    tolerance : float, optional
        Allowed relative error; default: that of `TOLERANCE`.
    nans : {"forbidden", "matching"}
        Whether NaN and infinity fail, or have to stand where `expected` has them and are left out otherwise.

    Raises
    ------
    AssertionError
        If the shapes differ, or the relative error is not below the tolerance. The text names the error, the worst
        element, and the rows in which elements are off.
    KeyError
        If `TOLERANCE` has no such dtype and there is no `tolerance`.
    TypeError, ValueError
        If something is no array, or the word is unknown.
    """
    check_word("nans", nans, ("forbidden", "matching"))
    name = np.dtype(got.dtype if dtype is None else dtype).name
    allowed = TOLERANCE[name] if tolerance is None else tolerance
    head = f"{what} {name}".strip()
    got, expected = _host("got", got), _host("expected", expected)
    if got.shape != expected.shape:
        raise AssertionError(f"{head}: shapes differ: got {got.shape}, expected {expected.shape}")
    if nans == "matching":
        same = (np.isnan(got) & np.isnan(expected)) | (np.isinf(expected) & (got == expected))
        got, expected = np.where(same, 0, got), np.where(same, 0, expected)
    error = _distance(got, expected, FLOOR.get(name, 0.0), unit)
    if not error < allowed:
        raise AssertionError(
            f"{head}: relative error {error:.2e}, allowed {allowed:.0e}; {_where(got, expected, allowed)}"
        )


def _where(got: np.ndarray, expected: np.ndarray, allowed: float) -> str:
    """Return where two different arrays differ."""
    with np.errstate(invalid="ignore"):
        difference = np.nan_to_num(np.abs(got - expected), nan=np.inf)
    worst = np.unravel_index(np.argmax(difference), difference.shape)
    text = f"worst at {tuple(map(int, worst))}: got {got[worst]:.6g}, expected {expected[worst]:.6g}"
    size = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    off = difference > allowed * size
    text += f"; {np.count_nonzero(off)} of {off.size} elements are off by more than {allowed:.0e} of the largest"
    if off.ndim > 1:
        rows = np.flatnonzero(off.reshape(off.shape[0], -1).any(1))
        listed = ", ".join(map(str, rows[:MAX_LISTED])) + (", ..." if rows.size > MAX_LISTED else "")
        text += f", in {rows.size} of {off.shape[0]} rows: {listed or 'none'}"
    return text


def assert_routing(routing: Any, num_experts: int, *, top_k: int | None = None) -> None:
    """Fail unless a routing is one that `cumoe.moe` reads as its author meant it.

    Parameters
    ----------
    routing : Routing or pair (topk_ids, topk_weights)
        Of any library.
    num_experts : int
    top_k : int, optional
        How many experts a token is to have.

    Raises
    ------
    AssertionError
        If the shapes differ, ids are no integers or outside ``[0, num_experts)``, a token has an expert twice, or a
        weight is not finite.
    TypeError
        If something is no array.
    """
    ids, weights = (_host(name, array, None) for name, array in zip(("ids", "weights"), routing, strict=True))
    assert ids.ndim == 2, f"topk_ids: expected 2 dimensions (num_tokens, top_k), got shape {ids.shape}"
    assert weights.shape == ids.shape, f"topk_weights: expected shape {ids.shape}, like topk_ids, got {weights.shape}"
    assert ids.dtype.kind in "iu", f"topk_ids: expected integers, got {ids.dtype}"
    assert top_k is None or ids.shape[1] == top_k, f"topk_ids: expected {top_k} experts a token, got {ids.shape[1]}"
    outside = np.argwhere((ids < 0) | (ids >= num_experts))
    assert not outside.size, f"topk_ids: expected ids from 0 to {num_experts - 1}, got {_first(ids, outside)}"
    ordered = np.sort(ids, axis=1)
    twice = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
    assert not twice.size, f"topk_ids: expected distinct experts, got {ids[twice[0, 0]]} for token {twice[0, 0]}"
    strange = np.argwhere(~np.isfinite(weights.astype(np.float64)))
    assert not strange.size, f"topk_weights: expected finite numbers, got {_first(weights, strange)}"


def _first(array: np.ndarray, places: np.ndarray) -> str:
    token, j = places[0]
    return f"{array[token, j]} at ({token}, {j})"


def _distance(got: np.ndarray, expected: np.ndarray, floor: float, unit: float) -> float:
    with np.errstate(invalid="ignore"):
        distance = float(np.linalg.norm(got - expected))
    if np.isnan(distance):
        return float("inf")
    root = got.size**0.5
    distance = max(0.0, distance - floor * root)
    return 0.0 if distance == 0 else distance / max(float(np.linalg.norm(expected)), unit * root, 1e-300)


def _host(name: str, array: Any, dtype: Any = np.float64) -> np.ndarray:
    """Return a NumPy array of the given dtype."""
    viewed, kind = admit(name, array)
    host = cupy.asnumpy(viewed) if kind.on_gpu else viewed
    return host if dtype is None else host.astype(dtype)
