"""A random case from a seed and a number, and nothing else."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from support import DTYPES

import cumoe
from cumoe.data.routing import GPU_MAX_EXPERTS

SIZES = (1, 3, 7, 8, 16, 24, 33, 64, 72, 96, 131, 136)
MANY_SIZES = (200, 264, 352)
NUM_TOKENS = (0, 1, 2, 3, 7, 8, 9, 16, 17, 33, 65)
MANY_TOKENS = (130, 257, 700)  # with eight experts a token the last is more slots than one block groups
NUM_EXPERTS = (1, 2, 3, 5, 8, 16, 33)
MANY_EXPERTS = (64, 257, 1024)
NONZEROS = 6  # of a token, and of a row of the down projection
EXACT = ("relu", "relu2", "identity")
ROUNDED = ("silu", "gelu", "gelu_tanh", "gpt_oss", "limited", "limited_after")
LIMITS = {
    "limited": cumoe.Activation("silu", limit=1.5),
    "limited_after": cumoe.Activation("silu", limit=1.5, clamp="after"),
}
DISTRIBUTIONS = ("uniform", "zipf", "one_hot", "empty", "repeated", "holes", "nobody")
FACTORS = (0.5, 1.0, 2.0)
ID_DTYPES = ("int32", "int32", "int64", "int16", "uint32")
FORMS = ("plain", "plain", "swapped", "padded", "offset", "stepped", "backward", "backward_rows")
"""How an array lies in memory; see `View.of`."""


@dataclass(frozen=True)
class View:
    """An array as a part of a larger one that is NaN besides."""

    storage: np.ndarray
    index: tuple = ()
    swapped: bool = False

    @classmethod
    def of(cls, array: np.ndarray, form: str) -> "View":
        """Put an array into memory so that ``on(identity)`` gives it back, with other strides."""
        array = np.ascontiguousarray(array)
        if form == "swapped" and array.ndim > 1:
            return cls(np.ascontiguousarray(array.swapaxes(-1, -2)), swapped=True)
        if form == "backward":
            return cls(np.ascontiguousarray(array[..., ::-1]), (..., slice(None, None, -1)))
        if form == "backward_rows":
            return cls(np.ascontiguousarray(array[::-1]), (slice(None, None, -1),))
        before, step, after = {"padded": (0, 1, 8), "offset": (1, 1, 7), "stepped": (0, 2, 0)}.get(form, (0, 1, 0))
        if array.size == 0 or (before, step, after) == (0, 1, 0):
            return cls(array)
        length = array.shape[-1]
        empty = 0 if array.dtype.kind in "iu" else np.nan  # an id in the gap is one that exists
        storage = np.full((*array.shape[:-1], before + step * length + after), empty, array.dtype)
        index = (..., slice(before, before + step * length, step))
        storage[index] = array
        return cls(storage, index)

    def on(self, move: Any) -> Any:
        """Return the array where `move` takes the storage."""
        array = move(self.storage)
        array = array[self.index] if self.index else array
        return array.swapaxes(-1, -2) if self.swapped else array

    def changed(self, change: Any) -> "View":
        """Return a copy in which `change` has been called with the array."""
        view = View(self.storage.copy(), self.index, self.swapped)
        change(view.on(lambda storage: storage))
        return view

    @property
    def array(self) -> np.ndarray:
        """The array on the host."""
        return self.on(lambda storage: storage)


@dataclass(frozen=True)
class Case:
    """A layer, its tokens and its routing, as views on the host; `options` says what was drawn."""

    options: dict[str, Any]
    x: View
    experts: dict[str, Any]
    shared: list[dict[str, Any]]
    ids: View | None = None  # either the routing is given
    weights: View | None = None
    router: cumoe.Router | None = None  # or the layer routes
    router_weight: View | None = None
    router_bias: np.ndarray | None = None
    output_bias: np.ndarray | None = None
    num_identity_experts: int = 0
    weight_on: str = "output"
    num_tokens: int = 0
    num_experts: int = 1
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))

    def routing(self) -> cumoe.Routing:
        """Return ids and float64 weights, by definition where the layer routes."""
        if self.router is None:
            assert self.ids is not None and self.weights is not None
            return cumoe.Routing(self.ids.array, self.weights.array.astype(np.float64))
        assert self.router_weight is not None
        logits = self.x.array.astype(np.float64) @ self.router_weight.array.astype(np.float64).T
        return cumoe.reference.route(logits if self.router_bias is None else logits + self.router_bias, self.router)


def draw(seed: int, number: int, largest: bool = True) -> Case:
    """Return case `number` of a seed; without `largest` all sizes are small."""
    rng = np.random.default_rng((seed, number))

    def pick(few: tuple, many: tuple = (), rare: float = 0.06) -> Any:
        pool = many if many and largest and rng.random() < rare else few
        return pool[rng.integers(len(pool))]

    o: dict[str, Any] = {
        "dtype": pick(tuple(DTYPES)),
        "num_tokens": pick(NUM_TOKENS, MANY_TOKENS),
        "hidden_size": pick(SIZES, MANY_SIZES),
        "intermediate_size": pick(SIZES, MANY_SIZES),
        "num_experts": pick(NUM_EXPERTS, MANY_EXPERTS),
        "activation": pick(ROUNDED) if rng.random() < 0.25 else pick(EXACT),
        "layout": pick(("stacked", "interleaved", "ungated")),
        "biases": pick((False, True)),
        "shared_sizes": tuple(pick(SIZES) for _ in range(pick((0, 0, 1, 2, 3)))),
        "gated_shared": rng.random() < 0.2,
        "weight_on": pick(("input", "activation", "output")),
        "routed_here": rng.random() < 0.25,
    }
    if o["num_experts"] > max(NUM_EXPERTS):  # the weights of many experts stay small
        o["hidden_size"], o["intermediate_size"] = min(o["hidden_size"], 72), min(o["intermediate_size"], 24)
        o["num_tokens"] = min(o["num_tokens"], 33)
    if (o["dtype"], o["activation"]) == ("float16", "relu2") and o["layout"] != "ungated":
        o["activation"] = "relu"  # cubes would end float16's range
    most = min(o["num_experts"], 8 if o["num_experts"] > 33 or rng.random() < 0.8 else o["num_experts"])
    o["top_k"] = most if rng.random() < 0.15 else int(rng.integers(1, most + 1))
    dtype = DTYPES[o["dtype"]]
    tall = (o["num_tokens"], o["hidden_size"])
    x = _sparse(rng, tall).astype(dtype)
    parts: dict[str, Any] = {}
    if o["routed_here"]:
        identity = pick((0, 0, 2, 8)) if o["weight_on"] == "output" else 0
        identity = o["num_identity_experts"] = min(identity, GPU_MAX_EXPERTS - o["num_experts"])
        num_choices = o["num_experts"] + identity
        parts |= {"num_identity_experts": identity, "router": _draw_router(rng, o, num_choices)}
        weight = rng.integers(-1, 2, (num_choices, o["hidden_size"]))
        own = pick(tuple(DTYPES))
        parts["router_weight"] = View.of(weight.astype(DTYPES[own]), pick(FORMS))
        o["router_dtype"] = own
        if rng.random() < 0.5:
            parts["router_bias"] = rng.integers(-8, 9, num_choices) / 4
        if rng.random() < 0.2:
            parts["output_bias"] = rng.integers(-2, 3, o["hidden_size"]) / 2
    else:
        o["distribution"], o["id_dtype"] = pick(DISTRIBUTIONS), pick(ID_DTYPES)
        ids = _draw_ids(rng, o).astype(o["id_dtype"])
        weights = rng.choice(FACTORS, ids.shape).astype(pick((*DTYPES.values(), np.float64)))
        o["ids_lie"], o["weights_lie"] = pick(FORMS), pick(FORMS)
        parts["ids"], parts["weights"] = View.of(ids, o["ids_lie"]), View.of(weights, o["weights_lie"])
    o["x_lies"] = pick(FORMS)
    return Case(
        o, View.of(x, o["x_lies"]), _draw_weights(rng, o, pick, (o["num_experts"],), o["intermediate_size"]),
        [_draw_weights(rng, o, pick, (), width) for width in o["shared_sizes"]], weight_on=o["weight_on"],
        num_tokens=o["num_tokens"], num_experts=o["num_experts"], dtype=dtype, **parts,
    )  # fmt: skip


def _sparse(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return -1, 0 and 1 with about `NONZEROS` numbers that are not 0 in a row."""
    signs = rng.integers(0, 2, shape, dtype=np.int8) * 2 - 1
    return np.where(rng.random(shape, np.float32) * shape[-1] < NONZEROS, signs, 0)


def _draw_weights(
    rng: np.random.Generator, o: dict[str, Any], pick: Any, stack: tuple[int, ...], width: int
) -> dict[str, Any]:
    dtype, rows = DTYPES[o["dtype"]], width if o["layout"] == "ungated" else 2 * width
    one_form = pick(FORMS)
    gate_up = rng.integers(-1, 2, (*stack, rows, o["hidden_size"]), dtype=np.int8).astype(dtype)
    down = _sparse(rng, (*stack, o["hidden_size"], width)).astype(dtype)
    parts: dict[str, Any] = {
        "w_gate_up": View.of(gate_up, one_form),
        "w_down": View.of(down, one_form if rng.random() < 0.7 else pick(FORMS)),
        "layout": o["layout"],
        "activation": LIMITS.get(o["activation"], o["activation"]),
    }
    if o["biases"]:
        factor_dtype = pick((*DTYPES.values(), np.float64))
        parts["b_gate_up"] = View.of(rng.integers(-2, 3, (*stack, rows)).astype(factor_dtype), pick(FORMS))
        parts["b_down"] = View.of(rng.integers(-2, 3, (*stack, o["hidden_size"])).astype(factor_dtype), pick(FORMS))
    if not stack and o["gated_shared"]:
        parts["gate"] = View.of(rng.integers(-1, 2, o["hidden_size"]).astype(dtype), pick(FORMS))
    return parts


def _draw_ids(rng: np.random.Generator, o: dict[str, Any]) -> np.ndarray:
    """Return (num_tokens, top_k) ids as their distribution wants them."""
    num_experts, top_k, shape = o["num_experts"], o["top_k"], (o["num_tokens"], o["num_experts"])
    liking = np.zeros(num_experts)
    if o["distribution"] == "zipf":
        liking = -np.log(1 + rng.permutation(num_experts))
    elif o["distribution"] == "empty":  # as few experts as there can be
        liking = np.where(np.arange(num_experts) % max(num_experts // top_k, 1) == 0, 50.0, 0.0)
    ids = np.argsort(-(liking + rng.gumbel(size=shape)), axis=1, kind="stable")[:, :top_k].astype(np.int64)
    if o["distribution"] == "one_hot":
        ids[:, 0] = num_experts - 1
    elif o["distribution"] == "repeated":
        ids[:] = ids[:, :1]
    elif o["distribution"] == "holes":
        ids[rng.random(ids.shape) < 0.3] = -1
        limits = np.iinfo(o["id_dtype"])
        outside = np.array([num_experts, limits.max, limits.min if limits.min < 0 else limits.max])
        odd = rng.random(ids.shape) < 0.15
        ids[odd] = rng.choice(outside, int(odd.sum()))
    elif o["distribution"] == "nobody":
        ids[:] = -1
    if o["id_dtype"] == "uint32":  # has no -1
        ids[ids < 0] = 2**32 - 1
    return ids


def _draw_router(rng: np.random.Generator, o: dict[str, Any], num_choices: int) -> cumoe.Router:
    """Return a router that ranks logits, which are exact here: its choice is known, ties included."""
    groups: dict[str, Any] = {}
    divisors = [g for g in (2, 4, 8) if num_choices % g == 0]
    if divisors and rng.random() < 0.3:
        num_groups = divisors[rng.integers(len(divisors))]
        fewest = -(-o["top_k"] * num_groups // num_choices)
        groups = {"num_groups": num_groups, "top_groups": int(rng.integers(fewest, num_groups + 1))}
        groups["group_score"] = ("sum_top2", "max")[rng.integers(2)]
    return cumoe.Router(
        o["top_k"],
        ("softmax", "sigmoid", "sqrt_softplus")[rng.integers(3)],
        "logits",
        renormalize=bool(rng.integers(2)),
        scale=float(rng.choice([1.0, 2.5])),
        **groups,
    )
