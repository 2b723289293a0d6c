"""Tables of refusals: a row is a function, the arguments that are wrong, the exception, three pieces of its message."""

import re
from types import FunctionType

import numpy as np
import pytest
from support import BF16

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
