"""Strategies for hypothesis: routings, logits, arrays and whole layers.

Hypothesis chooses sizes, words and a seed; the numbers come from a NumPy generator with that seed. So examples shrink
to few tokens and small layers, and large ones cost nothing to draw.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import cumoe
from cumoe.data.activation import NAMES
from cumoe.layer.moe import WEIGHT_ON

PATTERNS = ("uniform", "balanced", "one_expert", "few_experts", "with_holes", "repeated")
"""Of `routings`: distinct random experts; the experts in turn; one that every token goes to; all tokens to the same
top_k; slots without an expert (ids -1 and num_experts); an expert several times for one token."""

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MEMORY = ("contiguous", "strided", "transposed")

Size = int | st.SearchStrategy[int]
SEEDS = st.integers(0, 2**32 - 1)
TOKENS, EXPERTS = st.integers(0, 40), st.integers(1, 12)
HIDDEN_SIZES, INTERMEDIATE_SIZES = st.integers(1, 72), st.integers(1, 40)


def _sized(draw: Any, size: Size) -> int:
    return size if isinstance(size, int) else int(draw(size))


@st.composite
def routings(
    draw: Any,
    num_tokens: Size = TOKENS,
    num_experts: Size = EXPERTS,
    top_k: Size | None = None,
    patterns: Sequence[str] = PATTERNS,
) -> cumoe.Routing:
    """Draw routings of the given patterns, in NumPy arrays.

    Parameters
    ----------
    num_tokens, num_experts : int or strategy of int
    top_k : int or strategy of int, optional
        Default: up to 4, never more than there are experts.
    patterns : sequence of str
        Some of `PATTERNS`.

    Returns
    -------
    strategy of Routing
        ids int32, weights float32 in [0.1, 1).
    """
    tokens, experts = _sized(draw, num_tokens), _sized(draw, num_experts)
    k = draw(st.integers(1, min(4, experts))) if top_k is None else min(_sized(draw, top_k), experts)
    pattern, rng = draw(st.sampled_from(tuple(patterns))), np.random.default_rng(draw(SEEDS))
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype(np.int32)
    if pattern == "balanced":
        ids = (np.arange(tokens * k, dtype=np.int32) % experts).reshape(tokens, k)
    elif pattern == "one_expert":
        shift = (experts - 1 - ids[:, :1]) % experts
        ids = (ids + shift) % experts  # each row moved round until its first id is the last expert: still distinct
    elif pattern == "few_experts":
        ids[:] = ids[:1]
    elif pattern == "with_holes":
        ids[rng.random(ids.shape) < 0.3] = -1
        ids[rng.random(ids.shape) < 0.1] = experts
    elif pattern == "repeated":
        ids[:] = ids[:, :1]
    return cumoe.Routing(ids, rng.uniform(0.1, 1.0, ids.shape).astype(np.float32))


@st.composite
def router_logits(
    draw: Any,
    num_tokens: Size = TOKENS,
    num_experts: Size = EXPERTS,
    dtype: str = "float32",
    *,
    contents: Sequence[str] = ("normal", "ties", "large", "equal"),
) -> np.ndarray:
    """Draw router logits: normal numbers, whole ones with many ties, large ones, or all equal.

    Parameters
    ----------
    num_tokens, num_experts : int or strategy of int
    dtype : {"float32", "float16", "bfloat16"}
    contents : sequence of str
        Some of "normal", "ties", "large" (deviation 100), "equal".

    Returns
    -------
    strategy of (num_tokens, num_experts) numpy.ndarray
    """
    shape = _sized(draw, num_tokens), _sized(draw, num_experts)
    content, rng = draw(st.sampled_from(tuple(contents))), np.random.default_rng(draw(SEEDS))
    scale = {"normal": 1.0, "ties": 1.0, "large": 100.0, "equal": 0.0}[content]
    logits = scale * rng.standard_normal(shape)
    return (np.round(logits) if content == "ties" else logits).astype(DTYPES[dtype])


@st.composite
def arrays(
    draw: Any, shape: tuple[int, ...], dtype: str = "float32", *, scale: float = 1.0, memory: Sequence[str] = MEMORY
) -> np.ndarray:
    """Draw arrays of normal numbers that lie in memory in different ways.

    Parameters
    ----------
    shape : tuple of int
    dtype : {"float32", "float16", "bfloat16"}
    scale : float
        Standard deviation.
    memory : sequence of str
        Some of "contiguous", "strided" (every other element of a larger array) and "transposed" (the last two axes
        swapped in memory).

    Returns
    -------
    strategy of numpy.ndarray
    """
    return _normal(np.random.default_rng(draw(SEEDS)), shape, dtype, scale, draw(st.sampled_from(tuple(memory))))


def _normal(rng: Any, shape: tuple[int, ...], dtype: str, scale: float, memory: str = "contiguous") -> np.ndarray:
    values = (scale * rng.standard_normal(shape)).astype(DTYPES[dtype])
    if memory == "strided":
        wide = np.zeros((*shape[:-1], 2 * shape[-1]), values.dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    if memory == "transposed" and values.ndim > 1:
        return np.ascontiguousarray(values.swapaxes(-1, -2)).swapaxes(-1, -2)
    return values


class Layer(NamedTuple):
    """What `layers` draws: the arguments of `cumoe.moe`."""

    x: Any
    routing: cumoe.Routing
    experts: cumoe.Experts
    shared: list[cumoe.SharedExperts]
    weight_on: str

    def run(self) -> Any:
        """Compute the layer with `cumoe.moe`."""
        return cumoe.moe(self.x, self.routing, self.experts, self.shared, weight_on=self.weight_on)  # type: ignore[arg-type]

    def expected(self) -> np.ndarray:
        """Compute it by definition, in float64, where the arrays are NumPy's."""
        return cumoe.reference.moe(self.x, self.routing, self.experts, self.shared, weight_on=self.weight_on)


@st.composite
def layers(
    draw: Any,
    *,
    dtypes: Sequence[str] = tuple(DTYPES),
    num_tokens: Size = TOKENS,
    num_experts: Size = EXPERTS,
    hidden_size: Size = HIDDEN_SIZES,
    intermediate_size: Size = INTERMEDIATE_SIZES,
    patterns: Sequence[str] = PATTERNS,
    max_shared: int = 2,
    asarray: Callable[[np.ndarray], Any] = np.asarray,
) -> Layer:
    """Draw whole layers: any activation, layout, memory order, biases, shared experts with and without gate.

    Parameters
    ----------
    dtypes : sequence of str
        Of tokens and weights.
    num_tokens, num_experts, hidden_size, intermediate_size : int or strategy of int
        `intermediate_size` is drawn again for each shared expert.
    patterns : sequence of str
        As in `routings`.
    max_shared : int
        Up to how many shared experts.
    asarray : callable
        Applied to every array: `cupy.asarray` makes a layer for the GPU.

    Returns
    -------
    strategy of Layer
        Weights are scaled so that activations stay near 1.
    """
    dtype, rng = draw(st.sampled_from(tuple(dtypes))), np.random.default_rng(draw(SEEDS))
    hidden, experts = _sized(draw, hidden_size), _sized(draw, num_experts)
    routing = draw(routings(num_tokens, experts, patterns=patterns))
    memory = draw(st.sampled_from(MEMORY))

    def normal(shape: tuple[int, ...], scale: float) -> Any:
        return asarray(_normal(rng, shape, dtype, scale, memory))

    def holder(cls: Any, stack: tuple[int, ...]) -> Any:
        layout = draw(st.sampled_from(("stacked", "interleaved", "ungated")))
        width = _sized(draw, intermediate_size)
        rows = width if layout == "ungated" else 2 * width
        parts = {
            "w_gate_up": normal((*stack, rows, hidden), hidden**-0.5),
            "w_down": normal((*stack, hidden, width), width**-0.5),
        }
        if draw(st.booleans()):
            parts |= {"b_gate_up": normal((*stack, rows), 0.1), "b_down": normal((*stack, hidden), 0.1)}
        if not stack and draw(st.booleans()):
            parts["gate"] = normal((hidden,), hidden**-0.5)
        return cls(**parts, layout=layout, activation=draw(st.sampled_from((*NAMES, "gpt_oss"))))

    x = normal((routing.topk_ids.shape[0], hidden), 1.0)
    routed = holder(cumoe.Experts, (experts,))
    shared = [holder(cumoe.SharedExperts, ()) for _ in range(draw(st.integers(0, max_shared)))]
    placed = cumoe.Routing(asarray(routing.topk_ids), asarray(routing.topk_weights))
    return Layer(x, placed, routed, shared, draw(st.sampled_from(WEIGHT_ON)))
