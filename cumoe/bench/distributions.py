"""How the benchmark's tokens choose their experts."""

from pathlib import Path
from typing import Any

import numpy as np

import cumoe
from cumoe.bench.shapes import Shape
from cumoe.door.checks import FLOAT_DTYPES, ID_DTYPES

WORDS = "uniform, balanced, zipf:S, one-hot or FILE.npy"
HOT = 1000.0  # a logit that no other reaches


class Distribution:
    """A way to choose experts.

    ==========  ============================================================================================
    uniform     independent normal logits: every set of top_k experts is equally likely
    balanced    slot i goes to expert i modulo num_experts: as even as can be
    zipf:S      top_k drawn without replacement, expert e with a chance in proportion to (e + 1)^-S
    one-hot     every token's first expert is expert 0, the others are uniform
    FILE.npy    logits (tokens, num_experts) of a float dtype, or ids (tokens, top_k) of an int dtype
    ==========  ============================================================================================

    Parameters
    ----------
    name : str
        As above. A file's rows are repeated as often as more tokens are wanted.

    Raises
    ------
    ValueError
        If the word is unknown, the exponent is none, or the file cannot be read.
    """

    def __init__(self, name: str) -> None:
        self.name, self._exponent, self._rows = name, 0.0, None
        word, _, rest = name.partition(":")
        if word == "zipf":
            try:
                self._exponent = float(rest or 1)
            except ValueError:
                raise ValueError(f"{name}: expected a number behind zipf:, got {rest!r}") from None
            if not 0 <= self._exponent <= 100:
                raise ValueError(f"{name}: expected an exponent from 0 to 100, got {rest}")
        elif name not in ("uniform", "balanced", "one-hot"):
            self._rows = _read(name)

    def routing(self, xp: Any, shape: Shape, num_tokens: int) -> cumoe.Routing:
        """Return the routing of so many tokens of a checked layer, the same every time."""
        if self._rows is not None:
            rows = self._rows
            chosen = rows[np.arange(num_tokens) % len(rows)]
            if chosen.dtype.kind in "iu":
                return self._with_ids(xp, chosen.astype(np.int32))
            logits = chosen.astype(np.float32)
        elif self.name == "balanced":
            slots = np.arange(num_tokens * shape.top_k, dtype=np.int32)
            return self._with_ids(xp, (slots % shape.num_experts).reshape(num_tokens, shape.top_k))
        else:
            logits = self._logits(num_tokens, shape.num_experts)
        return cumoe.route(xp.asarray(logits), cumoe.Router(shape.top_k, scoring=shape.scoring))

    def _logits(self, num_tokens: int, num_experts: int) -> np.ndarray:
        rng = np.random.default_rng(num_tokens)
        if self.name.startswith("zipf"):  # the largest of log p + Gumbel noise are a draw without replacement from p
            logits = rng.gumbel(size=(num_tokens, num_experts)).astype(np.float32)
            logits -= np.float32(self._exponent) * np.log(np.arange(1, num_experts + 1, dtype=np.float32))
            return logits
        logits = rng.standard_normal((num_tokens, num_experts), np.float32)
        if self.name == "one-hot":
            logits[:, 0] = HOT
        return logits

    @staticmethod
    def _with_ids(xp: Any, ids: np.ndarray) -> cumoe.Routing:
        weights = np.full(ids.shape, 1 / ids.shape[1], np.float32)
        return cumoe.Routing(xp.asarray(np.ascontiguousarray(ids)), xp.asarray(weights))

    def check(self, shape: Shape) -> None:
        """Raise ValueError unless the rows of a file fit the layer."""
        rows = self._rows
        if rows is None:
            return
        is_ids = rows.dtype.kind in "iu"
        columns, what = (
            (shape.top_k, "ids (tokens, top_k") if is_ids else (shape.num_experts, "logits (tokens, experts")
        )
        if rows.shape[1] != columns:
            raise ValueError(f"{self.name}: expected {what}={columns}), got shape {rows.shape}")
        if is_ids and (rows.min() < 0 or rows.max() >= shape.num_experts):
            raise ValueError(f"{self.name}: expected ids from 0 to {shape.num_experts - 1}, got others")


def _read(name: str) -> np.ndarray:
    try:
        rows = np.load(Path(name), allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{name}: expected {WORDS}, got neither a word nor a file") from None
    except (OSError, ValueError, EOFError):
        raise ValueError(f"{name}: expected an array saved by numpy.save, got another file") from None
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.size == 0:
        raise ValueError(f"{name}: expected an array of two dimensions with rows, got {getattr(rows, 'shape', rows)}")
    if rows.dtype not in (*FLOAT_DTYPES, *ID_DTYPES, np.float64):
        raise ValueError(f"{name}: expected logits or ids, got {rows.dtype}")
    return rows
