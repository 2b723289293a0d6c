"""Failures that other projects had and that no other file here would show; tests/README.md lists all of them.

The name of a test says what went wrong elsewhere.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from support import DTYPES, assert_close, random_layer

import cumoe
from cumoe.gpu import sources

TESTS = Path(__file__).resolve().parent


def routed(backend, logits, router):
    """Route NumPy logits on a backend; return NumPy ids and weights."""
    return tuple(map(backend.asnumpy, cumoe.route(backend.asarray(logits), router)))


# --- where a weight goes ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_on", ["input", "activation", "output"])
def test_the_weight_was_applied_twice(backend, dtype, weight_on):
    """A half on the input is the half of the token, a half on the output the half of the result.

    To the bit, but for float16, which has numbers so small that their halves are rounded.
    """
    layer = random_layer(np.random.default_rng(0), dtype, top_k=1, weight_on=weight_on)
    layer.topk_weights[:] = 0.5
    y = layer.run(backend)
    layer.topk_weights[:] = 1
    if weight_on == "input":
        layer.x = (layer.x * layer.x.dtype.type(0.5)).astype(layer.x.dtype)
    once = layer.run(backend).astype(np.float32) * np.float32(1 if weight_on == "input" else 0.5)
    if dtype == "float16":
        assert_close(y, once, dtype)
    else:
        assert (y.astype(np.float32) == once).all()


@pytest.mark.parametrize("top_k", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_on_the_input_were_for_one_expert_a_token(backend, dtype, top_k):
    """Any number of them, each token with weights of its own; more tokens than experts, so that no transpose fits."""
    layer = random_layer(np.random.default_rng(top_k), dtype, num_experts=9, top_k=top_k, weight_on="input")
    assert_close(layer.run(backend), layer.expected(), dtype)


@pytest.mark.parametrize("num_shared", [0, 1, 2, 3])
@pytest.mark.parametrize("scale", [1.0, 2.5, 16.0])
@pytest.mark.parametrize("weight_on", ["input", "output"])
def test_the_scale_reached_shared_experts_or_was_lost_or_came_twice(backend, num_shared, scale, weight_on):
    """Each routed slot gets it once; what the shared experts add is the same with any scale."""
    layer = random_layer(np.random.default_rng(1), "float32", shared_sizes=(16, 24, 16)[:num_shared], gated_shared=True)
    logits = np.random.default_rng(2).standard_normal((33, 6)).astype(np.float32)
    x, _, experts, shared = layer.build(backend)

    def run(members):
        made = cumoe.MoE(cumoe.Router(2, renormalize=True, scale=scale), experts, members, weight_on=weight_on)
        return backend.asnumpy(made(x, backend.asarray(logits)))

    plain = cumoe.reference.route(logits, cumoe.Router(2, renormalize=True))
    layer.topk_ids, layer.weight_on = plain.topk_ids, weight_on
    layer.topk_weights = (scale * plain.topk_weights).astype(np.float32)
    assert_close(run(shared), layer.expected(), "float32")
    layer.topk_ids = np.full_like(plain.topk_ids, -1)
    shared_alone, size = layer.expected(), np.linalg.norm(run(shared))
    assert np.linalg.norm(run(shared) - run(()) - shared_alone) < 1e-5 * size


@pytest.mark.parametrize("ratio", [0.5, 1, 4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_experts_had_to_be_as_wide_as_routed_ones(backend, ratio, gated, dtype):
    """Half as wide, as wide, four times as wide."""
    layer = random_layer(
        np.random.default_rng(3), dtype, intermediate_size=32, shared_sizes=(int(32 * ratio),), gated_shared=gated
    )
    assert_close(layer.run(backend), layer.expected(), dtype)


# --- options that are taken and not used ---

ROUTER_OPTIONS = {
    "top_k": ({}, 2, 3),
    "scoring": ({}, "softmax", "sigmoid"),
    "select_by": ({}, "scores", "logits"),
    "renormalize": ({"scoring": "sigmoid"}, False, True),
    "renormalize_eps": ({"renormalize": True}, 0.0, 0.5),
    "renormalize_eps_mode": ({"renormalize": True, "renormalize_eps": 0.5}, "add", "clamp"),
    "renormalize_order": ({"renormalize": True}, 1, 2),
    "num_groups": ({"top_groups": 1}, 1, 2),
    "top_groups": ({"num_groups": 4}, 1, 2),
    "group_score": ({"num_groups": 4, "top_groups": 2}, "sum_top2", "max"),
    "dropped_groups": (
        {"num_groups": 4, "top_groups": 2, "selection_bias": np.full(12, -5, np.float32)}, "minus_inf", "zero",
    ),
    "selection_bias": ({}, None, np.linspace(-1, 1, 12)),
    "scale": ({}, 1.0, 2.5),
    "logit_softcap": ({}, None, 1.5),
    "expert_scale": ({}, None, np.linspace(1, 2, 12)),
    "mixer_eps": ({"scoring": "sparse_mixer"}, 0.01, 0.4),
    "expert_table": ({}, None, np.arange(40).reshape(20, 2) % 12),
}  # fmt: skip
"""Each option of a router beside what it takes to matter, and two values."""


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(cumoe.Router)])
def test_an_option_of_the_router_was_ignored(backend, option):
    """Every one of them changes a choice or a weight; an option without an entry above fails."""
    beside, *values = ROUTER_OPTIONS[option]
    logits = np.random.default_rng(4).standard_normal((40, 12)).astype(np.float32)
    results = []
    for value in values:
        options = {"top_k": 2, **beside, option: value}
        arrays = {name: backend.asarray(part) for name, part in options.items() if isinstance(part, np.ndarray)}
        ids = None if options.get("expert_table") is None else backend.asarray(np.arange(40, dtype=np.int32) % 20)
        routing = cumoe.route(backend.asarray(logits), cumoe.Router(**(options | arrays)), ids)
        results.append([backend.asnumpy(part) for part in routing])
    (ids, weights), (other_ids, other_weights) = results
    assert ids.shape != other_ids.shape or (ids != other_ids).any() or not np.allclose(weights, other_weights)


ACTIVATION_OPTIONS = {
    "name": ({}, "silu", "gelu"),
    "alpha": ({}, 1.0, 1.702),
    "limit": ({}, None, 7.0),
    "clamp": ({"limit": 7.0}, "before", "after"),
    "up_offset": ({}, 0.0, 1.0),
}


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(cumoe.Activation)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_option_of_the_activation_was_ignored(backend, option, dtype):
    """Also where gates are far beyond the limit, and the constants are those of no one model."""
    beside, *values = ACTIVATION_OPTIONS[option]
    results = []
    for value in values:
        layer = random_layer(np.random.default_rng(5), dtype, activation=cumoe.Activation(**beside, **{option: value}))
        layer.x = (layer.x * 8).astype(layer.x.dtype)
        results.append(layer.run(backend).astype(np.float64))
        assert_close(results[-1].astype(layer.x.dtype), layer.expected(), dtype)
    size = np.linalg.norm(results[0])
    assert np.linalg.norm(results[0] - results[1]) > (1e-4 if option == "clamp" else 1e-2) * size


@pytest.mark.parametrize("limit", [7.0, 10.0])
@pytest.mark.parametrize("clamp", ["before", "after"])
def test_the_limit_of_the_activation_was_dropped(backend, limit, clamp):
    """Gates and ups on both sides of it, in a layer whose result has no other bound."""
    activation = cumoe.Activation("silu", limit=limit, clamp=clamp)
    layer = random_layer(np.random.default_rng(6), "float32", activation=activation)
    layer.x *= 20
    y = layer.run(backend)
    assert_close(y, layer.expected(), "float32")
    layer.experts["activation"] = "silu"
    assert np.linalg.norm(y) < 0.9 * np.linalg.norm(layer.expected())


# --- routing ---


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_weights_were_logits_or_the_argument_renormalize_was_not_seen(backend, scoring, renormalize):
    """Scores as they are, which a logit below 0 is not, or divided by their sum, for every scoring."""
    logits = np.random.default_rng(7).normal(-1, 1, (20, 16)).astype(np.float32)
    ids, weights = routed(backend, logits, cumoe.Router(4, scoring, renormalize=renormalize))
    wide = logits.astype(np.float64)
    scores = {
        "softmax": np.exp(wide) / np.exp(wide).sum(axis=1, keepdims=True),
        "sigmoid": 1 / (1 + np.exp(-wide)),
        "sqrt_softplus": np.sqrt(np.log1p(np.exp(wide))),
    }[scoring]
    chosen = np.take_along_axis(scores, ids, axis=1)
    expected = chosen / chosen.sum(axis=1, keepdims=True) if renormalize else chosen
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert np.allclose(weights.sum(axis=1), 1) == renormalize


@pytest.mark.parametrize("num_experts", [8, 16, 60, 64, 96, 128, 160, 256, 384, 512, 896])
@pytest.mark.parametrize("top_k", [1, 2, 4, 6, 8])
def test_the_bias_was_in_the_weights_of_one_shape(backend, num_experts, top_k):
    """It moves the choice, and for no number of experts and choices a weight."""
    rng = np.random.default_rng(num_experts + top_k)
    logits, bias = rng.standard_normal((9, num_experts)).astype(np.float32), rng.uniform(3, 9, num_experts)
    router = cumoe.Router(top_k, "sigmoid", selection_bias=backend.asarray(bias.astype(np.float32)))
    ids, weights = routed(backend, logits, router)
    scores = 1 / (1 + np.exp(-np.take_along_axis(logits, ids, axis=1).astype(np.float64)))
    np.testing.assert_allclose(weights, scores, rtol=1e-5)
    biased = 1 / (1 + np.exp(-logits.astype(np.float64))) + bias
    np.testing.assert_allclose(np.take_along_axis(biased, ids, axis=1), -np.sort(-biased, axis=1)[:, :top_k], rtol=1e-6)


def test_many_tokens_and_experts_that_are_no_power_of_2(backend):
    """384 experts for 54,500 tokens: every token is routed as in a small batch."""
    few = np.random.default_rng(8).standard_normal((109, 384)).astype(np.float32)
    router = cumoe.Router(8, "sigmoid", renormalize=True)
    ids, weights = routed(backend, few, router)
    many_ids, many_weights = routed(backend, np.tile(few, (500, 1)), router)
    assert (many_ids == np.tile(ids, (500, 1))).all()
    np.testing.assert_allclose(many_weights, np.tile(weights, (500, 1)), rtol=1e-6)


@pytest.mark.parametrize("num_groups", [4, 8])
@pytest.mark.parametrize("group_score", ["sum_top2", "max"])
def test_groups_with_fewer_than_two_experts(backend, num_groups, group_score):
    """A group of one has the score of its expert: the groups' best are the experts' best."""
    logits = np.random.default_rng(9).standard_normal((30, num_groups)).astype(np.float32)
    router = cumoe.Router(2, "sigmoid", num_groups=num_groups, top_groups=3, group_score=group_score)
    ids, _ = routed(backend, logits, router)
    assert (ids == np.argsort(-logits, axis=1)[:, :2]).all()


# --- nobody, padding, sizes ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared_sizes", [(), (16,)])
def test_no_token_is_for_an_expert_of_this_process(backend, dtype, shared_sizes):
    """All ids are of others: zeros, or what the shared experts give; no expert's weights are read."""
    layer = random_layer(np.random.default_rng(10), dtype, shared_sizes=shared_sizes)
    layer.topk_ids[:, 0], layer.topk_ids[:, 1] = -1, 6
    for name in ("w_gate_up", "w_down"):
        layer.experts[name][:] = np.nan
    y = layer.run(backend)
    layer.experts = random_layer(np.random.default_rng(10), dtype, shared_sizes=shared_sizes).experts
    assert_close(y, layer.expected(), dtype)
    assert y.any() == bool(shared_sizes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_rows_held_what_was_in_memory(backend, dtype):
    """A batch padded to a fixed size, its padding NaN with ids of nobody: the tokens in front do not notice."""
    layer = random_layer(np.random.default_rng(11), dtype, num_tokens=40, hidden_size=136, intermediate_size=72)
    layer.topk_ids[25:] = -1
    clean = layer.run(backend)
    layer.x[25:], layer.topk_weights[25:] = np.nan, np.nan
    padded = layer.run(backend)
    assert padded.tobytes() == clean.tobytes()
    assert not padded[25:].astype(np.float32).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "k"), [(8192, 4096), (4096, 8192), (128, 8192), (8192, 128)])
def test_one_row_and_a_grid_that_is_not_square(backend, dtype, n, k):
    """A single token, many more tiles in one direction than in the other."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal((1, k)).astype(DTYPES[dtype])
    w = (rng.standard_normal((1, n, k), np.float32) * np.float32(k**-0.5)).astype(DTYPES[dtype])
    groups = cumoe.group(backend.asarray(np.zeros((1, 1), np.int32)), 1)
    y = backend.asnumpy(cumoe.grouped_gemm(backend.asarray(x), backend.asarray(w), groups))
    assert_close(y, x.astype(np.float64) @ w[0].astype(np.float64).T, dtype)


# --- numerics ---


@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_a_sum_left_the_range_of_float16_on_its_way(backend, scale):
    """60,000 + 60,000 - 60,000 is 60,000, also where a routing weight of 16 made it of 3,750: one rounding."""
    eye = np.eye(64, dtype=np.float16)
    down = np.stack([eye, eye, -eye])
    experts = cumoe.Experts(*map(backend.asarray, (np.stack([eye] * 3), down)), activation="identity", layout="ungated")
    x = np.full((4, 64), 60000 / scale, np.float16)
    ids = np.tile(np.arange(3, dtype=np.int32), (4, 1))
    weights = np.full((4, 3), scale, np.float32)
    y = backend.asnumpy(cumoe.moe(backend.asarray(x), tuple(map(backend.asarray, (ids, weights))), experts))
    assert (y == np.float16(60000)).all()


def test_a_header_of_the_toolkit_did_not_fit_the_compiler():
    """Two headers of types are all that the sources take from it; tensor cores are spoken to in PTX."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources.kernels_directory().glob("*.cu*"))
    assert set(re.findall(r"#include\s*<([^>]+)>", text)) == {"cuda_bf16.h", "cuda_fp16.h"}
    assert "nvcuda::" not in text


# --- the list ---

README = (TESTS / "README.md").read_text(encoding="utf-8")


def test_the_list_of_failures_names_tests_that_exist():
    """Each row says which tests would show the failure, or why it cannot happen here."""
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|$", README, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, 63))
    functions = {path.name: set(re.findall(r"^def (test_\w+)", path.read_text(), re.M)) for path in TESTS.rglob("*.py")}
    for number, failure, guard in rows:
        named = re.findall(r"`(?:(\w+\.py)::)?(test_\w+)`", guard)
        assert named or guard.startswith("no test: "), number
        assert len(failure) > 20, number
        for file, name in named:
            assert any(name in found for of, found in functions.items() if file in ("", of)), (number, name)
