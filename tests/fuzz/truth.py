"""What a case gives, in float64, and how far off each element of an implementation may be."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cumoe.data.activation import as_activation
from cumoe.data.weights import ExpertWeights
from fuzz.draw import EXACT, Case, View

FLOAT32_ERROR = 2e-5
"""Of sums, factors and activations in float32, relative to the sum of all magnitudes."""

ROUNDINGS = 3
"""To 16 bits: a hidden number, an expert's result, the result; each is off by at most half a last place."""


@dataclass(frozen=True)
class Truth:
    """A result and its neighbourhood."""

    y: np.ndarray  # float64
    allowed: np.ndarray  # largest difference, element by element
    exact: bool  # whether no order of sums and no rounding inside changes a bit of the result
    topk_ids: np.ndarray  # as int64, ids that name no expert as -1

    def wrong(self, got: np.ndarray, rows: np.ndarray | slice = slice(None)) -> str:
        """Return what is wrong with these rows of a result, or nothing."""
        if self.exact:
            expected = self.y.astype(np.float32).astype(got.dtype)
            differs = got.astype(np.float64) != expected.astype(np.float64)
            what = "exact"
        else:
            differs = ~(np.abs(got.astype(np.float64) - self.y) <= self.allowed)
            what = "within a bound"
        looked_at = np.zeros(differs.shape, bool)
        looked_at[rows] = True
        differs &= looked_at
        if not differs.any():
            return ""
        worst = tuple(map(int, np.argwhere(differs)[0]))
        return (
            f"{int(differs.sum())} of {differs.size} are wrong ({what}); at {worst} {got[worst]}, not {self.y[worst]}"
        )


def truth(case: Case) -> Truth:
    """Compute a case slot by slot in float64."""
    routing = case.routing()
    ids = routing.topk_ids.astype(np.int64)
    x = case.x.array.astype(np.float64)
    tally = _Tally(x.shape, case.dtype)
    if case.num_identity_experts:
        tokens, slots = np.nonzero(ids >= case.num_experts)
        rows = routing.topk_weights[tokens, slots, None] * x[tokens]
        tally.add(tokens, x[tokens], rows, np.abs(rows), np.abs(rows) + 1)
    if case.output_bias is not None:
        rows = np.broadcast_to(case.output_bias, x.shape)
        tally.add(np.arange(len(x)), x, rows, np.abs(rows), np.abs(rows))
    ids = np.where((ids >= 0) & (ids < case.num_experts), ids, -1)
    experts, top_k = _weights(case.experts), ids.shape[1]
    for e in np.unique(ids[ids >= 0]):
        slots = np.flatnonzero(ids == e)
        factors = routing.topk_weights.astype(np.float64).ravel()[slots, None]
        tally.add(slots // top_k, *_rows(x[slots // top_k], experts, e, case.weight_on, factors))
    for parts in case.shared:
        gate = 1.0
        if "gate" in parts:
            gate = 1 / (1 + np.exp(-(x @ parts["gate"].array.astype(np.float64))))[:, None]
        every = np.arange(len(x))
        tally.add(every, *_rows(x, _weights(parts, stacked=False), 0, "output", gate))
    rounds = case.options["activation"] not in EXACT or case.router is not None
    rounds |= any("gate" in parts for parts in case.shared)
    exact = not rounds and tally.representable and tally.magnitude.max(initial=0) < 2**18
    step = float(ml_dtypes.finfo(case.dtype).eps) / 2
    roundings = 1 if case.dtype == np.float32 else ROUNDINGS
    allowed = roundings * step * tally.terms + FLOAT32_ERROR * tally.magnitude
    return Truth(tally.y, allowed, bool(exact), ids)


class _Tally:
    """Sums of rows, of their magnitudes, and whether each of them survives a rounding."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.y, self.terms, self.magnitude = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.dtype, self.representable = dtype, True

    def add(
        self, tokens: np.ndarray, hidden: np.ndarray, rows: np.ndarray, terms: np.ndarray, magnitude: np.ndarray
    ) -> None:
        """Add rows to tokens, of which one may come twice."""
        np.add.at(self.y, tokens, rows)
        np.add.at(self.terms, tokens, terms)
        np.add.at(self.magnitude, tokens, magnitude)
        for inside in (hidden, rows):
            self.representable &= bool((inside.astype(self.dtype).astype(np.float64) == inside).all())


def _weights(parts: dict[str, Any], stacked: bool = True) -> ExpertWeights:
    """Return the parts of a case in float64; `stacked`: they have an axis of experts."""
    wide = {name: part.array.astype(np.float64) for name, part in parts.items() if isinstance(part, View)}
    arrays = {name: array if stacked else array[None] for name, array in wide.items()}
    gate_up, down, *biases = (arrays.get(name) for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"))
    return ExpertWeights(gate_up, down, *biases, as_activation(parts["activation"]), parts["layout"])


def _rows(
    x: np.ndarray, weights: ExpertWeights, e: int, weight_on: str, factors: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return hidden rows, result rows, sums of their terms' magnitudes, and bounds of all magnitudes on the way."""
    before = factors if weight_on == "input" else 1.0
    between = factors if weight_on == "activation" else 1.0
    behind = factors if weight_on == "output" else 1.0
    w, down = weights.w_gate_up[e], weights.w_down[e]
    bias = 0.0 if weights.b_gate_up is None else weights.b_gate_up[e]
    bias_down = 0.0 if weights.b_down is None else weights.b_down[e]
    hidden = between * weights.activation.apply(*weights.split(before * (x @ w.T) + bias))
    rows = behind * (hidden @ down.T + bias_down)
    terms = np.abs(behind) * (np.abs(hidden) @ np.abs(down).T + np.abs(bias_down))
    large = np.abs(before) * (np.abs(x) @ np.abs(w).T) + np.abs(bias) + 1
    gate, up = weights.split(large)
    large = gate * (gate if up is None else up + abs(weights.activation.up_offset))
    magnitude = np.abs(behind) * ((np.abs(between) * large) @ np.abs(down).T + np.abs(bias_down))
    return hidden, rows, terms, magnitude
