"""Everything that is refused, and the words: ``name: expected this, got that``.

A row is a function, the arguments that are wrong, the exception, and three pieces of its message. With the arguments
of `VALID` alone the call succeeds.
"""

import re
import sys
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
from support import BF16, CPU, GPU, gpu_is_there

import cumoe

TYPE, VALUE = TypeError, ValueError
F64, F32, F16, I32, I64 = np.float64, np.float32, np.float16, np.int32, np.int64


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def experts(asarray, num_experts=6, dtype=np.float32):
    return cumoe.Experts(asarray(ones(num_experts, 8, 5, dtype=dtype)), asarray(ones(num_experts, 5, 4, dtype=dtype)))


def shared(asarray, hidden_size=5, dtype=np.float32):
    return cumoe.SharedExperts(asarray(ones(8, hidden_size, dtype=dtype)), asarray(ones(hidden_size, 4, dtype=dtype)))


def routing(asarray, ids=(3, 2), weights=(3, 2), ids_dtype=I32, weights_dtype=np.float32):
    return cumoe.Routing(asarray(ones(*ids, dtype=ids_dtype)), asarray(ones(*weights, dtype=weights_dtype)))


def groups(asarray):
    return cumoe.group(asarray(ones(3, 2, dtype=I32)), 6)


def call_layer(x, router_logits=None, out=None, **layer):
    return cumoe.MoE(**layer)(x, router_logits, out=out)


def workspace_bytes(num_tokens, **layer):
    return cumoe.MoE(**layer).workspace_bytes(num_tokens)


VALID = {
    cumoe.Activation: {},
    cumoe.Router: {"top_k": 2},
    cumoe.Experts: {"w_gate_up": ones(6, 8, 5), "w_down": ones(6, 5, 4)},
    cumoe.SharedExperts: {"w_gate_up": ones(8, 5), "w_down": ones(5, 4)},
    cumoe.route: {"router_logits": ones(3, 6), "router": cumoe.Router(2)},
    cumoe.group: {"topk_ids": ones(3, 2, dtype=I32), "num_experts": 6},
    cumoe.grouped_gemm: {"x": ones(6, 5), "w": ones(6, 4, 5), "groups": groups},
    cumoe.combine: {"rows": ones(6, 5), "groups": groups},
    cumoe.moe: {"x": ones(3, 5), "routing": routing, "experts": experts},
    cumoe.MoE: {"router": cumoe.Router(2), "experts": experts},
    call_layer: {"x": ones(3, 5), "router": cumoe.Router(2), "experts": experts, "router_weight": ones(6, 5)},
    workspace_bytes: {"num_tokens": 3, "router": cumoe.Router(2), "experts": experts},
    cumoe.show_config: {"mode": "dicts"},
    cumoe.expert_load: {"routing": routing, "num_experts": 6},
}
"""Arguments that are accepted. A NumPy array is moved to the backend; a function is called with its `asarray`."""

ARRAY = "a NumPy array, a CuPy array or an object with __dlpack__"
FLOATS = "dtype float32, float16 or bfloat16"
FACTORS = "dtype float32, float16, bfloat16 or float64"
INTEGERS = "dtype int8, int16, int32, int64, uint8, uint16 or uint32"
WRONG = {FLOATS: (F64, I32), FACTORS: (I32, bool), INTEGERS: (F32, bool, np.uint64), "dtype float32": (F16, BF16, F64)}
WRONG |= {f"dtype float32, like {owner}": (F16, BF16) for owner in ("w_gate_up", "x")}


def words(name, known):
    return [({name: "other"}, VALUE, name, known, "'other'"), ({name: 1}, TYPE, name, "one of the words", "int")]


def counts(name, low):
    rows = [({name: value}, TYPE, name, "an int", type(value).__name__) for value in (True, 2.0, "2")]
    return [*rows, ({name: low - 1}, VALUE, name, f"at least {low}", str(low - 1))]


def numbers(name, **too_low):
    """Return rows for an argument that is a finite number; `too_low` maps what is expected to numbers below it."""
    rows = [({name: value}, TYPE, name, "a number", type(value).__name__) for value in (True, "7", np.bool_(True))]
    rows += [({name: float(word)}, VALUE, name, "a finite number", word) for word in ("nan", "inf", "-inf")]
    low = {"above": "a number above 0", "at_least": "a number of at least 0"}
    return rows + [({name: n}, VALUE, name, low[key], f"{n:g}") for key, values in too_low.items() for n in values]


def arrays(name, shape, dtypes, axes):
    """Return rows for an argument that is an array: things that are none, wrong dtypes, an axis too many."""
    rows = [({name: value}, TYPE, name, ARRAY, type(value).__name__) for value in ([[1.0]], 1.0, F32(1))]
    rows += [({name: ones(*shape, dtype=d)}, TYPE, name, dtypes, np.dtype(d).name) for d in WRONG[dtypes]]
    return [*rows, ({name: ones(1, *shape)}, VALUE, name, axes, str((1, *shape)))]


def other_groups(field, array, exception, expected, got):
    return ({"groups": lambda a: groups(a)._replace(**{field: array(a)})}, exception, field, expected, got)


OUT = [
    *arrays("out", (3, 5), "dtype float32", "num_tokens=3, hidden_size=5"),
    ({"out": ones(5, 3)}, VALUE, "out", "num_tokens=3, hidden_size=5", "(5, 3)"),
]
GROUPS = [
    ({"groups": lambda a: tuple(groups(a))}, TYPE, "groups", "a cumoe.Groups", "tuple"),
    other_groups("permutation", lambda a: [0] * 6, TYPE, ARRAY, "list"),
    other_groups("permutation", lambda a: a(ones(6, dtype=I64)), TYPE, "dtype int32", "int64"),
    other_groups("permutation", lambda a: a(ones(5, dtype=I32)), VALUE, "num_tokens * top_k=6", "(5,)"),
    other_groups("permutation", lambda a: a(ones(12, dtype=I32))[::2], VALUE, "a contiguous array", "strides (8,)"),
    other_groups("expert_offsets", lambda a: a(ones(6, dtype=I32)), VALUE, "num_experts + 1=7", "(6,)"),
    other_groups("expert_offsets", lambda a: a(ones(7)), TYPE, "dtype int32", "float32"),
    other_groups("tokens_per_expert", lambda a: a(ones(6, 1, dtype=I32)), VALUE, "1 dimension (num", "(6, 1)"),
    other_groups("inverse_permutation", lambda a: a(ones(6, dtype=I32)), VALUE, "2 dimensions (num", "(6,)"),
]
ROUTERS = [
    ({"router": {"top_k": 2}}, TYPE, "router", "a cumoe.Router", "dict"),
    ({"router": cumoe.Router(7)}, VALUE, "top_k", "an int from 1 to 6 (num_experts of ", "7"),
    ({"router": cumoe.Router(1, num_groups=4, top_groups=2)}, VALUE, "num_groups", "divisor of num_experts=6", "4"),
    ({"router": cumoe.Router(3, num_groups=3, top_groups=1)}, VALUE, "top_k", "at most 2", "3"),
    ({"router": lambda a: cumoe.Router(2, selection_bias=a(ones(5)))}, VALUE, "selection_bias", "experts=6", "(5,)"),
    ({"router": lambda a: cumoe.Router(2, expert_scale=a(ones(7)))}, VALUE, "expert_scale", "experts=6", "(7,)"),
]
TOKENS = [
    *arrays("x", (3, 5), "dtype float32", "2 dimensions (num_tokens, hidden_size)"),
    ({"x": ones(3, 4)}, VALUE, "x", "num_tokens=3, hidden_size=5", "(3, 4)"),
    ({"experts": lambda a: experts(a, dtype=F16)}, TYPE, "x", "dtype float16", "float32"),
]
WEIGHTS = [
    ({"experts": ones(6, 8, 5)}, TYPE, "experts", "a cumoe.Experts", "ndarray"),
    ({"shared": ones(8, 5)}, TYPE, "shared", "a cumoe.SharedExperts, or a sequence of them", "ndarray"),
    ({"shared": lambda a: [shared(a), None]}, TYPE, "shared[1]", "a cumoe.SharedExperts", "NoneType"),
    ({"shared": lambda a: shared(a, dtype=BF16)}, TYPE, "shared", "dtype float32, like experts", "bfloat16"),
    ({"shared": lambda a: [shared(a, 4)]}, VALUE, "shared[0]", "hidden_size=5, like experts", "4"),
    *words("weight_on", "'input', 'activation' or 'output'"),
]

ROWS = {
    cumoe.Activation: [
        ({"name": "swish"}, VALUE, "activation", "'gelu', 'gelu_tanh', 'relu', 'relu2' or 'identity'", "'swish'"),
        ({"name": None}, TYPE, "activation", "one of the words", "NoneType"),
        *numbers("alpha"), *numbers("limit", above=(0, -7)), *numbers("up_offset"),
        *words("clamp", "'before' or 'after'"),
    ],
    cumoe.Router: [
        *counts("top_k", 1), *counts("num_groups", 1),
        *words("scoring", "'softmax', 'sigmoid', 'sqrt_softplus' or 'sparse_mixer'"),
        *words("select_by", "'scores' or 'logits'"),
        *words("group_score", "'sum_top2' or 'max'"), *words("dropped_groups", "'minus_inf' or 'zero'"),
        *words("renormalize_eps_mode", "'add' or 'clamp'"), *numbers("renormalize_eps", at_least=(-1e-6,)),
        *numbers("scale"), *numbers("logit_softcap", above=(0, -30)),
        ({"renormalize": 1}, TYPE, "renormalize", "True or False", "1"),
        ({"renormalize_order": 3}, VALUE, "renormalize_order", "an int from 1 to 2", "3"),
        ({"renormalize_order": True}, TYPE, "renormalize_order", "an int", "bool"),
        ({"num_groups": 4}, VALUE, "top_groups", "an int from 1 to 4 (num_groups)", "None"),
        ({"num_groups": 4, "top_groups": 5}, VALUE, "top_groups", "an int from 1 to 4 (num_groups)", "5"),
        ({"num_groups": 4, "top_groups": 0}, VALUE, "top_groups", "an int from 1 to 4 (num_groups)", "0"),
        ({"num_groups": 4, "top_groups": True}, TYPE, "top_groups", "an int", "bool"),
        ({"top_groups": 2}, VALUE, "top_groups", "an int from 1 to 1 (num_groups)", "2"),
        *arrays("selection_bias", (6,), FACTORS, "1 dimension (num_experts)"),
        *arrays("expert_scale", (6,), FACTORS, "1 dimension (num_experts)"),
        ({"selection_bias": ones(1)}, VALUE, "top_k", "an int from 1 to 1 (num_experts of selection_bias)", "2"),
        ({"selection_bias": ones(6), "expert_scale": ones(5)}, VALUE, "expert_scale", "length 6", "length 5"),
        ({"num_groups": 4, "top_groups": 2, "expert_scale": ones(6)}, VALUE, "num_groups", "divisor of num", "4"),
        ({"num_groups": 6, "top_groups": 1, "selection_bias": ones(6)}, VALUE, "top_k", "at most 1", "2"),
    ],
    cumoe.Experts: [
        *arrays("w_gate_up", (6, 8, 5), FLOATS, "(num_experts, 2 * intermediate_size, hidden_size)"),
        *arrays("w_down", (6, 5, 4), "dtype float32, like w_gate_up", "(num_experts, hidden_size, intermediate_size)"),
        *arrays("b_gate_up", (6, 8), FACTORS, "(num_experts=6, 2 * intermediate_size=8)"),
        *arrays("b_down", (6, 5), FACTORS, "(num_experts=6, hidden_size=5)"),
        ({"w_gate_up": None}, TYPE, "w_gate_up", ARRAY, "NoneType"),
        ({"w_gate_up": ones(6, 7, 5)}, VALUE, "w_gate_up", "an even number of rows", "(6, 7, 5)"),
        ({"w_gate_up": ones(6, 7, 5), "layout": "interleaved"}, VALUE, "w_gate_up", "an even number", "(6, 7, 5)"),
        ({"w_gate_up": ones(0, 8, 5)}, VALUE, "num_experts of w_gate_up", "at least 1", "0"),
        ({"w_gate_up": ones(6, 0, 5)}, VALUE, "2 * intermediate_size of w_gate_up", "at least 1", "0"),
        ({"w_gate_up": ones(6, 8, 0)}, VALUE, "hidden_size of w_gate_up", "at least 1", "0"),
        ({"w_down": ones(6, 4, 5)}, VALUE, "w_down", "experts=6, hidden_size=5, intermediate_size=4", "(6, 4, 5)"),
        ({"layout": "ungated"}, VALUE, "w_down", "intermediate_size=8", "(6, 5, 4)"),
        ({"activation": "swiglu"}, VALUE, "activation", "'identity' or 'gpt_oss'", "'swiglu'"),
        ({"activation": np.tanh}, TYPE, "activation", "a word or a cumoe.Activation", "ufunc"),
        *words("layout", "'stacked', 'interleaved' or 'ungated'"),
    ],
    cumoe.SharedExperts: [
        *arrays("w_gate_up", (8, 5), FLOATS, "")[:-1],
        ({"w_gate_up": ones(5)}, VALUE, "w_gate_up", "2 dimensions (2 * intermediate_size, hidden_size) or 3", "(5,)"),
        *arrays("w_down", (5, 4), "dtype float32, like w_gate_up", "2 dimensions (hidden_size, intermediate_size)"),
        *arrays("b_gate_up", (8,), FACTORS, "_size=8)"), *arrays("b_down", (5,), FACTORS, "(hidden_size=5)"),
        *arrays("gate", (4,), "dtype float32, like w_gate_up", "hidden_size=5"),
        ({"w_down": None}, TYPE, "w_down", ARRAY, "NoneType"),
        ({"w_gate_up": ones(7, 5)}, VALUE, "w_gate_up", "an even number of rows", "(7, 5)"),
        ({"w_down": ones(5, 3)}, VALUE, "w_down", "hidden_size=5, intermediate_size=4", "(5, 3)"),
        ({"b_gate_up": ones(4)}, VALUE, "b_gate_up", "2 * intermediate_size=8", "(4,)"),
        ({"gate": ones(4)}, VALUE, "gate", "hidden_size=5", "(4,)"),
        ({"w_gate_up": ones(2, 8, 5), "w_down": ones(2, 5, 4), "gate": ones(5)}, VALUE, "gate", "shared=2", "(5,)"),
        ({"w_gate_up": ones(0, 8, 5), "w_down": ones(0, 5, 4)}, VALUE, "num_shared of w_gate_up", "at least 1", "0"),
        ({"activation": 3}, TYPE, "activation", "a word or a cumoe.Activation", "int"),
        *words("layout", "'stacked', 'interleaved' or 'ungated'"),
    ],
    cumoe.route: [
        *arrays("router_logits", (3, 6), FLOATS, "2 dimensions (num_tokens, num_experts)"),
        ({"router_logits": ones(3, 0)}, VALUE, "num_experts", "at least 1", "0"),
        *ROUTERS,
    ],
    cumoe.group: [
        *arrays("topk_ids", (3, 2), INTEGERS, "")[:-1], *counts("num_experts", 1),
        ({"topk_ids": ones(3, dtype=I32)}, VALUE, "topk_ids", "2 dimensions (num_tokens, top_k)", "(3,)"),
        ({"topk_ids": ones(3, 0, dtype=I32)}, VALUE, "top_k", "at least 1", "0"),
    ],
    cumoe.grouped_gemm: [
        *arrays("x", (6, 5), FLOATS, "2 dimensions (rows, K)"),
        *arrays("w", (6, 4, 5), "dtype float32, like x", "3 dimensions (num_experts, N, K)"),
        *arrays("bias", (6, 4), FACTORS, "num_experts=6, N=4"),
        *arrays("row_scale", (3, 2), FACTORS, "num_tokens=3, top_k=2"),
        ({"x": ones(3, 5)}, VALUE, "x", "num_tokens * top_k=6, K=5", "(3, 5)"),
        ({"x": ones(6, 5), "rows": "tokens"}, VALUE, "x", "num_tokens=3, K=5", "(6, 5)"),
        ({"x": ones(6, 4)}, VALUE, "x", "K=5", "(6, 4)"),
        ({"w": ones(0, 4, 5)}, VALUE, "num_experts of w", "at least 1", "0"),
        ({"w": ones(6, 0, 5)}, VALUE, "N of w", "at least 1", "0"),
        ({"w": ones(6, 4, 0), "x": ones(6, 0)}, VALUE, "K of w", "at least 1", "0"),
        ({"w": ones(5, 4, 5)}, VALUE, "expert_offsets", "num_experts + 1=6", "(7,)"),
        ({"dtype": F64}, TYPE, "dtype", "float32, float16 or bfloat16", "float64"),
        ({"dtype": "bfloat"}, TYPE, "dtype", "float32, float16 or bfloat16", "bfloat"),
        *words("rows", "'sorted' or 'tokens'"),
        *GROUPS,
    ],
    cumoe.combine: [
        *arrays("rows", (6, 5), "dtype float32", "2 dimensions (num_tokens * top_k, hidden_size)"),
        *arrays("topk_weights", (3, 2), FACTORS, "num_tokens=3, top_k=2"),
        *arrays("shared_rows", (1, 3, 5), "dtype float32", "3 dimensions (num_shared, num_tokens, hidden_size)"),
        ({"rows": ones(7, 5)}, VALUE, "rows", "num_tokens * top_k=6", "(7, 5)"),
        ({"shared_rows": ones(2, 3, 4)}, VALUE, "shared_rows", "num_shared=2, num_tokens=3, hidden", "(2, 3, 4)"),
        ({"dtype": I32}, TYPE, "dtype", "float32, float16 or bfloat16", "int32"),
        ({"dtype": "bfloat"}, TYPE, "dtype", "float32, float16 or bfloat16", "bfloat"),
        *OUT, *GROUPS,
    ],
    cumoe.moe: [
        *TOKENS, *WEIGHTS, *OUT,
        ({"routing": None}, TYPE, "routing", "a cumoe.Routing or a pair (topk_ids, topk_weights)", "NoneType"),
        ({"routing": lambda a: (*routing(a), 3)}, TYPE, "routing", "a pair", "tuple"),
        ({"routing": ones(2, 3, 2)}, TYPE, "routing", "a pair", "ndarray"),
        ({"routing": lambda a: (routing(a)[0], [0.5] * 6)}, TYPE, "topk_weights", ARRAY, "list"),
        ({"routing": lambda a: routing(a, ids_dtype=F32)}, TYPE, "topk_ids", INTEGERS, "float32"),
        ({"routing": lambda a: routing(a, weights_dtype=I32)}, TYPE, "topk_weights", FACTORS, "int32"),
        ({"routing": lambda a: routing(a, ids=(3,))}, VALUE, "topk_ids", "2 dimensions (num_tokens, top_k)", "(3,)"),
        ({"routing": lambda a: routing(a, ids=(4, 2))}, VALUE, "topk_ids", "num_tokens=3, top_k=2", "(4, 2)"),
        ({"routing": lambda a: routing(a, ids=(3, 0))}, VALUE, "top_k", "at least 1", "0"),
        ({"routing": lambda a: routing(a, weights=(2, 3))}, VALUE, "topk_weights", "num_tokens=3, top_k=2", "(2, 3)"),
    ],
    cumoe.MoE: [
        *ROUTERS, *WEIGHTS, *counts("max_tokens", 0),
        *arrays("router_weight", (6, 5), FLOATS, "num_experts=6, hidden_size=5"),
        ({"router_weight": ones(5, 6)}, VALUE, "router_weight", "num_experts=6, hidden_size=5", "(5, 6)"),
        *arrays("router_bias", (6,), FACTORS, "num_experts=6"),
        ({"router_bias": ones(6)}, VALUE, "router_weight", "an array, since there is a router_bias", "None"),
    ],
    call_layer: [
        *TOKENS, *OUT,
        *arrays("router_logits", (3, 6), FLOATS, "2 dimensions (num_tokens, num_experts)"),
        ({"router_logits": ones(2, 6)}, VALUE, "router_logits", "num_tokens=3, num_experts=6", "(2, 6)"),
        ({"router_logits": ones(3, 7)}, VALUE, "router_logits", "num_tokens=3, num_experts=6", "(3, 7)"),
        ({"router_weight": None}, VALUE, "router_logits", "an array, since", "None"),
    ],
    workspace_bytes: counts("num_tokens", 0),
    cumoe.show_config: words("mode", "'stdout' or 'dicts'"),
    cumoe.expert_load: [
        *counts("num_experts", 1), *words("scoring", "'softmax' or 'sigmoid'"),
        *arrays("router_logits", (3, 6), FLOATS, "num_tokens=3, num_experts=6"),
        ({"routing": ones(2, 3, 2)}, TYPE, "routing", "a pair", "ndarray"),
        ({"routing": lambda a: routing(a, ids_dtype=F32)}, TYPE, "topk_ids", INTEGERS, "float32"),
        ({"routing": lambda a: routing(a, ids=(3,))}, VALUE, "topk_ids", "2 dimensions (num_tokens, top_k)", "(3,)"),
        ({"routing": lambda a: routing(a, weights=(2, 3))}, VALUE, "topk_weights", "num_tokens=3, top_k=2", "(2, 3)"),
        ({"router_logits": lambda a: a(ones(3, 6)), "num_experts": 5}, VALUE, "router_logits", "experts=5", "(3, 6)"),
    ],
}  # fmt: skip


class Foreign:
    """An array of a library that speaks DLPack and nothing else."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


@pytest.fixture(autouse=True)
def foreign_library(monkeypatch):
    """Let the class above come from a package that can import."""
    library = SimpleNamespace(__name__="foreign", from_dlpack=lambda exporter: Foreign(np.from_dlpack(exporter)))
    monkeypatch.setattr(Foreign, "__module__", "foreign")
    monkeypatch.setitem(sys.modules, "foreign", library)


Homeless = type("Homeless", (Foreign,), {"__module__": "nowhere"})  # its library takes nothing back


def big_endian(*shape, dtype=">f4"):
    return np.ones(shape, dtype)


def read_only(*shape):
    return np.broadcast_to(np.float32(1), shape)


CPU_ROWS = [
    (cumoe.moe, {"x": np.ma.ones((3, 5), np.float32)}, TYPE, "x", ARRAY, "MaskedArray"),
    (cumoe.moe, {"x": big_endian(3, 5)}, TYPE, "x", "dtype float32", "float32 in foreign byte order"),
    (cumoe.route, {"router_logits": big_endian(3, 6)}, TYPE, "router_logits", FLOATS, "foreign byte order"),
    (cumoe.group, {"topk_ids": big_endian(3, 2, dtype=">i4")}, TYPE, "topk_ids", INTEGERS, "foreign byte order"),
    (cumoe.Router, {"selection_bias": big_endian(6)}, TYPE, "selection_bias", FACTORS, "foreign byte order"),
    (cumoe.Experts, {"w_gate_up": big_endian(6, 8, 5)}, TYPE, "w_gate_up", FLOATS, "foreign byte order"),
    (cumoe.Experts, {"w_down": big_endian(6, 5, 4)}, TYPE, "w_down", "dtype float32", "foreign byte order"),
    (cumoe.SharedExperts, {"gate": big_endian(5)}, TYPE, "gate", "dtype float32", "foreign byte order"),
    (cumoe.grouped_gemm, {"w": big_endian(6, 4, 5)}, TYPE, "w", "dtype float32", "foreign byte order"),
    (cumoe.moe, {"out": read_only(3, 5)}, VALUE, "out", "a writable array", "a read-only one"),
    (cumoe.combine, {"out": read_only(3, 5)}, VALUE, "out", "a writable array", "a read-only one"),
    (call_layer, {"out": read_only(3, 5)}, VALUE, "out", "a writable array", "a read-only one"),
    (cumoe.route, {"router_logits": read_only(2**30, 6)}, VALUE, "num_tokens", "below 2^31", "1073741824"),
    (cumoe.group, {"topk_ids": np.broadcast_to(0, (2**30, 2))}, VALUE, "num_tokens", "below 2^31", "1073741824"),
    (call_layer, {"x": read_only(2**30, 5)}, VALUE, "num_tokens", "below 2^31", "1073741824"),
    (cumoe.moe, {"x": Foreign(ones(3, 5))}, TYPE, "x", "a numpy array on cpu, like experts", "a foreign array on cpu"),
    (cumoe.moe, {"out": Foreign(ones(3, 5))}, TYPE, "out", "a numpy array on cpu, like x", "a foreign array on cpu"),
    (cumoe.moe, {"shared": lambda a: shared(Foreign)}, TYPE, "shared", "a numpy array", "a foreign array on cpu"),
    (cumoe.moe, {"experts": lambda a: experts(Foreign)}, TYPE, "x", "a foreign array on cpu", "a numpy array on cpu"),
    (cumoe.moe, {"routing": lambda a: routing(Foreign)}, TYPE, "topk_ids", "a numpy array", "a foreign array on cpu"),
    (cumoe.Experts, {"w_down": Foreign(ones(6, 5, 4))}, TYPE, "w_down", "a numpy array", "a foreign array on cpu"),
    (cumoe.MoE, {"router_weight": Foreign(ones(6, 5))}, TYPE, "router_weight", "a numpy array", "a foreign array"),
    (cumoe.combine, {"groups": lambda a: groups(Foreign)}, TYPE, "permutation", "a numpy array", "a foreign array"),
    (cumoe.route, {"router": lambda a: cumoe.Router(2, selection_bias=Foreign(ones(6)))}, TYPE, "selection_bias",
     "a numpy array on cpu, like router_logits", "a foreign array on cpu"),
    (cumoe.moe, {"x": Foreign(ones(3, 5), (10, 0))}, TYPE, "x", "on the CPU or on a CUDA device", "device type 10"),
    (cumoe.moe, {"x": Homeless(ones(3, 5))}, TYPE, "x", "whose library has from_dlpack", "nowhere.Homeless"),
]  # fmt: skip

GPU_ROWS = [
    (cumoe.moe, {"x": lambda a: ones(3, 5)}, TYPE, "x", "a cupy array on cuda:0, like experts", "a numpy array"),
    (cumoe.moe, {"experts": lambda a: experts(CPU.asarray)}, TYPE, "x", "a numpy array on cpu", "a cupy array"),
    (cumoe.moe, {"shared": lambda a: shared(CPU.asarray)}, TYPE, "shared", "a cupy array", "a numpy array on cpu"),
    (cumoe.moe, {"routing": lambda a: routing(CPU.asarray)}, TYPE, "topk_ids", "a cupy array", "a numpy array on cpu"),
    (cumoe.Experts, {"w_down": lambda a: ones(6, 5, 4)}, TYPE, "w_down", "a cupy array", "a numpy array on cpu"),
    (cumoe.combine, {"groups": lambda a: groups(CPU.asarray)}, TYPE, "permutation", "a cupy array", "a numpy array"),
    (cumoe.moe, {"out": lambda a: a(ones(3, 10))[:, ::2]}, VALUE, "out", "a C-contiguous array on a GPU", "strides"),
    (cumoe.route, {"router_logits": ones(3, 1025)}, VALUE, "num_experts", "an int from 1 to 1024 on a GPU", "1025"),
    (cumoe.group, {"num_experts": 1025}, VALUE, "num_experts", "an int from 1 to 1024 on a GPU", "1025"),
    (cumoe.expert_load, {"num_experts": 1025}, VALUE, "num_experts", "an int from 1 to 1024 on a GPU", "1025"),
    (cumoe.MoE, {"experts": lambda a: experts(a, 1025)}, VALUE, "num_experts", "1 to 1024 on a GPU", "1025"),
]  # fmt: skip


def arguments(backend, function, changes):
    def build(value):
        if isinstance(value, np.ndarray):
            return backend.asarray(value)
        return value(backend.asarray) if isinstance(value, FunctionType) else value

    return {name: build(value) for name, value in (VALID[function] | changes).items()}


def assert_refused(backend, function, changes, exception, name, expected, got):
    """Fail unless the call raises that very exception, with a message of the one form that there is."""
    wrong = arguments(backend, function, changes)
    with pytest.raises(exception) as caught:
        function(**wrong)
    assert caught.type is exception
    name, expected, got = map(re.escape, (name, expected, got))
    assert re.fullmatch(f"{name}: expected .*{expected}.*, got .*{got}.*", str(caught.value)), caught.value


def table(rows):
    """Parametrize a test with rows, each named after its function, its place in the table and the refused argument."""
    names = [f"{row[0].__name__}-{i}-{row[3]}" for i, row in enumerate(rows)]
    return pytest.mark.parametrize("row", rows, ids=names)


@pytest.mark.parametrize("function", VALID, ids=lambda function: function.__name__)
def test_the_other_arguments_are_accepted(backend, function):
    """No row of the tables is refused for what it does not change."""
    function(**arguments(backend, function, {}))


def test_a_foreign_library_is_accepted():
    """An exporter goes in and one of its library comes out."""
    y = cumoe.moe(Foreign(ones(3, 5)), routing(Foreign), experts(Foreign), shared(Foreign))
    assert type(y) is Foreign
    assert (y.array == cumoe.moe(ones(3, 5), routing(CPU.asarray), experts(CPU.asarray), shared(CPU.asarray))).all()


@table([(function, *row) for function, rows in ROWS.items() for row in rows])
def test_refused_everywhere(backend, row):
    """Wrong kinds, dtypes, shapes, words and numbers."""
    assert_refused(backend, *row)


@table(CPU_ROWS)
def test_refused_on_the_cpu(row):
    """What only a NumPy array can be, and arrays of two libraries."""
    assert_refused(CPU, *row)


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_is_there(), reason="no CUDA device")
@table(GPU_ROWS)
def test_refused_on_a_gpu(row):
    """NumPy arrays beside CuPy arrays, and the limits of the kernels."""
    assert_refused(GPU, *row)
