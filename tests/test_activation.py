"""Activations against the formulas of `math`, one number at a time."""

import math

import numpy as np
import pytest

import cumoe

NUMBERS = [-30.0, -7.5, -2.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 2.0, 7.5, 30.0]
PHI = {
    "silu": lambda g, alpha: g / (1 + math.exp(-alpha * g)),
    "gelu": lambda g, _: g * math.erfc(-g / math.sqrt(2)) / 2,
    "gelu_tanh": lambda g, _: g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2,
    "relu": lambda g, _: max(g, 0.0),
    "relu2": lambda g, _: max(g, 0.0) ** 2,
    "identity": lambda g, _: g,
}


def by_hand(activation, g, u):
    """Return the gated activation of two numbers."""
    if activation.limit is not None:
        u = min(max(u, -activation.limit), activation.limit)
        if activation.clamp == "before":
            g = min(g, activation.limit)
    h = PHI[activation.name](g, activation.alpha)
    if activation.limit is not None and activation.clamp == "after":
        h = min(h, activation.limit)
    return h * (u + activation.up_offset)


def through_a_layer(backend, activation, layout, gate, up):
    """Return what one expert of width 1 makes of given gate and up values: its weights pick them out of the token."""
    picks = {"stacked": [[1, 0], [0, 1]], "interleaved": [[1, 0], [0, 1]], "ungated": [[1, 0]]}[layout]
    parts = np.array([picks], np.float32), np.array([[[1], [0]]], np.float32)
    experts = cumoe.Experts(*map(backend.asarray, parts), activation=activation, layout=layout)
    x = np.stack([gate, up], axis=1).astype(np.float32)
    routing = np.zeros((len(x), 1), np.int32), np.ones((len(x), 1), np.float32)
    y = cumoe.moe(backend.asarray(x), cumoe.Routing(*map(backend.asarray, routing)), experts)
    return backend.asnumpy(y)[:, 0]


@pytest.mark.parametrize("name", PHI)
@pytest.mark.parametrize(
    "options", [{}, {"limit": 1.5}, {"limit": 1.5, "clamp": "after"}, {"up_offset": 1.0}, {"alpha": 1.7}]
)
@pytest.mark.parametrize("layout", ["stacked", "interleaved"])
def test_gated(backend, name, options, layout):
    """Every phi, both clamps, gate and up on both sides of the limit."""
    activation = cumoe.Activation(name, **options)
    gate, up = (values.ravel() for values in np.meshgrid(NUMBERS, NUMBERS))
    expected = [by_hand(activation, g, u) for g, u in zip(gate, up, strict=True)]
    np.testing.assert_allclose(through_a_layer(backend, activation, layout, gate, up), expected, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("name", PHI)
def test_ungated(backend, name):
    """Phi alone; what the token holds besides is not used."""
    gate = np.array(NUMBERS)
    expected = [PHI[name](g, 1.0) for g in NUMBERS]
    got = through_a_layer(backend, cumoe.Activation(name), "ungated", gate, np.ones_like(gate))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("name", PHI)
@pytest.mark.parametrize("clamp", ["before", "after"])
def test_nan_stays_nan(backend, name, clamp):
    """A clamp does not hide that something went wrong."""
    gate, up = np.array([np.nan, 1.0, 2.0]), np.array([1.0, np.nan, 2.0])
    got = through_a_layer(backend, cumoe.Activation(name, limit=1.0, clamp=clamp), "stacked", gate, up)
    assert np.isnan(got).tolist() == [True, True, False]
