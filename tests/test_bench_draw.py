"""What the benchmark draws: routings, even or not, and numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import DTYPES

from cumoe.bench import draw
from cumoe.bench.distributions import Distribution
from cumoe.bench.draw import CHUNK, fill
from cumoe.bench.shapes import Shape


@pytest.mark.parametrize("name", ["uniform", "balanced", "zipf:0", "zipf:1.2", "zipf", "one-hot"])
def test_distributions(name):
    """Distinct experts a token, the same every time, as uneven as the word says."""
    shape = Shape(8, 8, 16, 3)
    first, again = (Distribution(name).routing(np, shape, 2000) for _ in range(2))
    assert (first.topk_ids == again.topk_ids).all()
    assert all(len(set(row)) == 3 for row in first.topk_ids.tolist())
    counts = np.bincount(first.topk_ids.ravel(), minlength=16)
    if name == "balanced":
        assert counts.max() - counts.min() <= 1
    elif name == "one-hot":
        assert counts[0] == 2000 and counts[1:].max() < 400
    elif name in ("uniform", "zipf:0"):
        assert counts.min() > 300 and counts.max() < 450
    else:
        assert counts[0] > 2 * counts[4] > 2 * counts[-1]


def test_zipf_is_a_draw_without_replacement():
    """With one expert a token, an expert's share is its chance."""
    routing = Distribution("zipf:1").routing(np, Shape(8, 8, 4, 1), 40_000)
    shares = np.bincount(routing.topk_ids.ravel(), minlength=4) / 40_000
    chances = 1 / np.arange(1, 5)
    assert np.abs(shares - chances / chances.sum()).max() < 0.01


def test_routing_from_a_file(tmp_path):
    """Ids or logits, repeated as often as tokens are wanted."""
    shape, path = Shape(8, 8, 4, 2), tmp_path / "rows.npy"
    np.save(path, np.array([[0, 1], [2, 3], [1, 0]]))
    found = Distribution(str(path))
    found.check(shape)
    assert found.routing(np, shape, 5).topk_ids.tolist() == [[0, 1], [2, 3], [1, 0], [0, 1], [2, 3]]
    logits = np.random.default_rng(0).standard_normal((3, 4))
    np.save(path, logits)
    found = Distribution(str(path))
    found.check(shape)
    assert found.routing(np, shape, 2).topk_ids.tolist() == (-logits).argsort(1)[:2, :2].tolist()


@given(st.integers(0, 40), st.sampled_from(["uniform", "balanced", "zipf:2", "one-hot"]))
def test_few_tokens(num_tokens, name):
    """Any number of tokens can be routed."""
    routing = Distribution(name).routing(np, Shape(8, 8, 16, 3), num_tokens)
    assert routing.topk_ids.shape == routing.topk_weights.shape == (num_tokens, 3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_filled_numbers_are_normal(dtype):
    """Moments, no pattern along an axis, others in every chunk and with every seed; never zeros."""
    a = fill(np, np.empty((1 << 9, 1 << 9), DTYPES[dtype]), 1, 2.0).astype(np.float64).ravel()
    other = fill(np, np.empty(1 << 18, DTYPES[dtype]), 2, 2.0).astype(np.float64)
    assert abs(a.mean()) < 0.02
    assert abs(a.std() - 2) < 0.02
    assert abs(((a / 2) ** 4).mean() - 3) < 0.1
    assert (a == 0).mean() < 1e-3
    for shift in (1, 7, 512):
        assert abs(np.corrcoef(a[shift:], a[:-shift])[0, 1]) < 0.02
    assert abs(np.corrcoef(a, other)[0, 1]) < 0.02


def test_chunks_differ(monkeypatch):
    """The second chunk does not repeat the first, and the last may be short."""
    assert CHUNK * 4 * 4 <= 1 << 30  # four float32 or uint32 arrays at a time
    monkeypatch.setattr(draw, "CHUNK", 1 << 12)
    a = fill(np, np.empty((1 << 13) + 5, np.float32), 1, 1.0)
    assert abs(np.corrcoef(a[: 1 << 12], a[1 << 12 : 1 << 13])[0, 1]) < 0.1
    assert np.unique(a).size > 8000
