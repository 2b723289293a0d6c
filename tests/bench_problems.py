"""Tiny layers of every kind that the benchmark knows, drawn with NumPy, and their exact results."""

import numpy as np
from support import BF16

import cumoe
from cumoe.bench.distributions import Distribution
from cumoe.bench.draw import Weights
from cumoe.bench.problem import Problem
from cumoe.bench.roofs import Roofs
from cumoe.bench.shapes import Shape

TINY = Shape(64, 48, 8, 2, 1, 48, "input", "sigmoid")
ROOFS = Roofs(product=800e12, copy=4e12, read=4e12)
TINY_SHAPES = {
    "input": TINY,
    "shared": Shape(64, 48, 8, 2, 2, 40),
    "gate": Shape(64, 48, 8, 2, 1, 96, shared_gate=True),
    "ungated": Shape(64, 48, 8, 2, 1, 40, activation="relu2", layout="ungated"),
    "biases": Shape(64, 48, 8, 2, activation="gpt_oss", layout="interleaved", biases=True),
}


class NumpySteps:
    """What the kernels of the loop compute."""

    def gather(self, x, tokens, scales):
        rows = x[tokens].astype(np.float32)
        return (rows if scales is None else rows * scales[:, None]).astype(x.dtype)

    def activate(self, hidden, activation):
        values = hidden.astype(np.float32)
        if activation == "relu2":
            return (np.maximum(values, 0) ** 2).astype(hidden.dtype)
        gate, up = np.split(values, 2, axis=1)
        return (gate / (1 + np.exp(-gate)) * up).astype(hidden.dtype)

    def add(self, total, rows, tokens, scales):
        rows = rows.astype(np.float32)
        total[tokens] += rows if scales is None else rows * scales[:, None]


def problem_of(shape, num_tokens=33, dtype=BF16, routing="uniform", weight_on=None):
    weights = Weights(np, shape, dtype)
    return Problem(np, shape, weights, num_tokens, weight_on or shape.weight_on, Distribution(routing))


def exact(problem):
    """Return what the problem is by definition."""
    weights = problem.weights
    return cumoe.reference.moe(problem.x, problem.routing, weights.experts, weights.shared, weight_on=problem.weight_on)


def difference(y, expected):
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)
