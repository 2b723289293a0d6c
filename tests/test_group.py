"""Grouping against its definition, exactly: every array is integers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cumoe

NO_EXPERT = [-1, -7, -(2**31), -(2**31) - 1, -(2**32), -(2**40), -(2**63)]
NO_EXPERT += [2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**40, 2**63 - 1]
"""Ids that name no expert; cut to 32 bits some of them would name expert 0 or 1."""


def run(backend, ids, num_experts):
    """Group ids that lie on `backend`; return NumPy arrays."""
    groups = cumoe.group(ids, num_experts)
    assert isinstance(groups, cumoe.Groups)
    return cumoe.Groups(*map(backend.asnumpy, groups))


def sort(ids, num_experts):
    """Group by one stable sort: for sizes at which the reference, a loop, is slow."""
    slots = ids.ravel()
    bins = np.where((slots >= 0) & (slots < num_experts), slots, num_experts)
    permutation = np.argsort(bins, kind="stable").astype(np.int32)
    offsets = np.searchsorted(bins[permutation], np.arange(num_experts + 1)).astype(np.int32)
    inverse = np.argsort(permutation).astype(np.int32)
    inverse[bins == num_experts] = -1
    return cumoe.Groups(permutation, offsets, np.diff(offsets), inverse.reshape(ids.shape))


def assert_same(got, expected):
    """Fail unless all four arrays agree in dtype, shape and every element."""
    for name, array in got._asdict().items():
        assert array.dtype == np.int32, name
        np.testing.assert_array_equal(array, getattr(expected, name), err_msg=name, strict=True)


@settings(max_examples=200)
@given(
    num_tokens=st.integers(0, 60),
    top_k=st.integers(1, 9),
    num_experts=st.sampled_from([1, 2, 3, 8, 31, 33, 60, 64, 127]),
    dtype=st.sampled_from(["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"]),
    pattern=st.sampled_from(["uniform", "with_holes", "one_expert", "two_experts", "repeated", "only_holes", "sorted"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_group_equals_its_definition(backend, num_tokens, top_k, num_experts, dtype, pattern, seed):
    """Any number of slots and experts, any integers."""
    rng = np.random.default_rng(seed)
    shape, signed = (num_tokens, top_k), dtype.startswith("i")
    ids = rng.integers(0, num_experts, shape)
    if pattern == "with_holes":
        ids = rng.integers(-1 if signed else 0, num_experts + 1, shape)
    elif pattern == "one_expert":
        ids[:] = rng.integers(0, num_experts)
    elif pattern == "two_experts":
        ids = np.where(rng.random(shape) < 0.1, 0, num_experts - 1)
    elif pattern == "repeated":
        ids[:] = ids[:, :1]
    elif pattern == "only_holes":
        ids[:] = -1 if signed else num_experts
    elif pattern == "sorted":
        ids = np.sort(ids, axis=None).reshape(shape)
    if dtype == "int8":
        ids = np.minimum(ids, 127)
    ids = ids.astype(dtype)
    expected = cumoe.reference.group(ids, num_experts)
    assert_same(run(backend, backend.asarray(ids), num_experts), expected)
    assert_same(sort(ids.astype(np.int64), num_experts), expected)


@pytest.mark.parametrize("num_experts", [1, 2, 257, 1024])
@pytest.mark.parametrize(
    ("num_tokens", "top_k"),
    [(512, 2), (1025, 1), (512, 8), (4097, 1), (1366, 3), (5000, 4), (20_000, 1), (32_769, 4), (50_021, 6)],
)
def test_many_slots(backend, num_tokens, top_k, num_experts):
    """Around 1024 slots, where one block no longer does everything, and far beyond; with every hundredth a hole."""
    rng = np.random.default_rng(num_tokens)
    ids = rng.integers(0, num_experts, (num_tokens, top_k)).astype(np.int32)
    ids[rng.random(ids.shape) < 0.01] = -1
    assert_same(run(backend, backend.asarray(ids), num_experts), sort(ids, num_experts))


@pytest.mark.parametrize("num_tokens", [3, 4096, 20_000])
@pytest.mark.parametrize("expert", [0, 511, 1023, -1])
def test_one_expert_takes_all(backend, num_tokens, expert):
    """The order of its slots is kept; with -1 nobody takes any."""
    ids = np.full((num_tokens, 2), expert, np.int32)
    groups = run(backend, backend.asarray(ids), 1024)
    assert_same(groups, sort(ids, 1024))
    assert (groups.permutation == np.arange(2 * num_tokens)).all()


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32"])
@pytest.mark.parametrize("num_experts", [1, 2, 1024])
def test_huge_ids_name_no_expert(backend, dtype, num_experts):
    """Ids that do not fit 32 bits never wrap around to an expert."""
    limits = np.iinfo(dtype)
    outside = np.array([i for i in [*NO_EXPERT, num_experts] if limits.min <= i <= limits.max], dtype)
    ids = np.stack([outside, np.zeros_like(outside), outside[::-1]], axis=1)
    groups = run(backend, backend.asarray(ids), num_experts)
    assert_same(groups, cumoe.reference.group(ids, num_experts))
    assert groups.tokens_per_expert[0] == groups.expert_offsets[-1] == len(outside)
    assert (groups.inverse_permutation[:, [0, 2]] == -1).all()


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
@pytest.mark.parametrize("view", ["transposed", "every_other", "backward"])
def test_ids_may_be_any_view(backend, dtype, view):
    """What lies between the ids is not read."""
    ids = np.random.default_rng(0).integers(0, 7, (40, 3)).astype(dtype)
    if view == "transposed":
        strided = backend.asarray(np.ascontiguousarray(ids.T)).T
    elif view == "every_other":
        wide = np.full((80, 6), 5, dtype)
        wide[::2, ::2] = ids
        strided = backend.asarray(wide)[::2, ::2]
    else:
        strided = backend.asarray(np.ascontiguousarray(ids[::-1, ::-1]))[::-1, ::-1]
    assert not strided.flags.c_contiguous
    assert_same(run(backend, strided, 7), cumoe.reference.group(ids, 7))


def test_no_tokens(backend):
    """Nothing to sort still gives offsets and counts."""
    groups = run(backend, backend.asarray(np.zeros((0, 4), np.int64)), 1000)
    assert_same(groups, cumoe.reference.group(np.zeros((0, 4), np.int64), 1000))
    assert not groups.expert_offsets.any()
    assert not groups.tokens_per_expert.any()


def test_ids_are_not_written(backend):
    """The caller's ids stay as they were, holes included."""
    ids = np.array([[3, -1], [2**40, 0]], np.int64)
    given_ids = backend.asarray(ids.copy())
    run(backend, given_ids, 4)
    assert (backend.asnumpy(given_ids) == ids).all()
