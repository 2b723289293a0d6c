"""Everything that is refused, and the words: ``name: expected this, got that``.

A row is a function, the arguments that are wrong, the exception, and three pieces of its message. With the arguments
of `VALID` alone the call succeeds. Arrays of another library or device are in test_refusals_owners.py.
"""

import numpy as np
import pytest
from refusals import (
    ARRAY,
    F16,
    F32,
    F64,
    FACTORS,
    FLOATS,
    I32,
    I64,
    INTEGERS,
    TYPE,
    VALID,
    VALUE,
    arguments,
    arrays,
    assert_refused,
    call_layer,
    counts,
    experts,
    groups,
    numbers,
    ones,
    routing,
    shared,
    table,
    words,
    workspace_bytes,
)
from support import BF16

import cumoe


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


@pytest.mark.parametrize("function", VALID, ids=lambda function: function.__name__)
def test_the_other_arguments_are_accepted(backend, function):
    """No row of the tables is refused for what it does not change."""
    function(**arguments(backend, function, {}))


@table([(function, *row) for function, rows in ROWS.items() for row in rows])
def test_refused_everywhere(backend, row):
    """Wrong kinds, dtypes, shapes, words and numbers."""
    assert_refused(backend, *row)
