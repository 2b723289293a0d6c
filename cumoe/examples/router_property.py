"""Test a router of one's own with hypothesis: needs hypothesis.

    python -m pytest --pyargs cumoe.examples.router_property

Put your router in the place of `my_router`.
"""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import cumoe
from cumoe.testing import assert_close, assert_routing, layers, router_logits

TOP_K = 2


def my_router(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the experts with the largest logits; their weights are a softmax over the chosen."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K]
    chosen = np.take_along_axis(logits, ids, axis=1)
    weights = np.exp(chosen - chosen.max(axis=1, keepdims=True, initial=-np.inf))
    return ids.astype(np.int32), (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


@given(router_logits(num_experts=st.integers(TOP_K, 64)))
def test_my_router_is_a_router(logits: np.ndarray) -> None:
    """Experts are distinct and exist, weights are finite and sum to 1, also for ties and large logits."""
    ids, weights = my_router(logits)
    assert_routing((ids, weights), logits.shape[1], top_k=TOP_K)
    assert np.allclose(weights.sum(axis=1), 1)


@given(router_logits(num_experts=st.integers(TOP_K, 64)))
def test_my_router_agrees_with_cumoe(logits: np.ndarray) -> None:
    """The same experts, also where logits are equal, and the same weights."""
    ids, weights = my_router(logits)
    expected = cumoe.route(logits, cumoe.Router(TOP_K, select_by="logits"))
    assert (ids == expected.topk_ids).all()
    assert_close(weights, expected.topk_weights)


@given(layers(num_experts=st.integers(TOP_K, 8), max_shared=1), st.data())
def test_a_layer_behind_my_router(layer: cumoe.testing.Layer, data: st.DataObject) -> None:
    """Whatever the layer is, what the router says is what is computed."""
    logits = data.draw(router_logits(layer.x.shape[0], layer.experts.num_experts))
    routed = layer._replace(routing=cumoe.Routing(*my_router(logits)))
    assert_close(routed.run(), routed.expected(), layer.x.dtype)
