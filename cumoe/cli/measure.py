"""Time, memory and error of one or several ways to compute the same."""

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

import cumoe
from cumoe.cli.layer import Layer
from cumoe.cli.machine import Machine, Run


class Measurement(NamedTuple):
    """What one candidate took."""

    y: np.ndarray
    seconds: float  # median of the runs
    peak_bytes: int  # of one run, its result included


def measure(candidates: Mapping[str, Run], machine: Machine) -> dict[str, Measurement]:
    """Run all candidates in turns, so that a change of clocks meets each of them; their first runs do not count."""
    results = {name: machine.to_numpy(run()) for name, run in candidates.items()}
    peaks = {name: machine.peak_bytes(run) for name, run in candidates.items()}
    one_round = sum(machine.seconds(run) for run in candidates.values())
    rounds = min(20, max(3, int(machine.seconds_to_spend * len(candidates) / max(one_round, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(machine.seconds(run))
    return {name: Measurement(results[name], statistics.median(times[name]), peaks[name]) for name in candidates}


def relative_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Return ``||one - other|| / ||other||`` over the finite rows; infinity unless both have the same finite rows."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(other).all(1)
    if (finite != np.isfinite(one).all(1)).any():
        return float("inf")
    distance = float(np.linalg.norm(one[finite] - other[finite]))
    return 0.0 if distance == 0 else distance / max(float(np.linalg.norm(other[finite])), 1e-300)


def sample_of(layer: Layer, num_tokens: int) -> np.ndarray:
    """Return the tokens that are computed in float64: at most 16, few where an expert is large."""
    affordable = 20_000_000 // layer.family.multiplications(1)
    count = min(num_tokens, max(2, min(16, affordable)))
    return np.unique(np.linspace(0, num_tokens - 1, count).astype(int)) if count else np.empty(0, int)


def by_definition(layer: Layer, x: Any, routing: cumoe.Routing, sample: np.ndarray, machine: Machine) -> np.ndarray:
    """Return those rows in float64 from `cumoe.reference`, token by token with copies of the experts that it meets.

    A row that the dtype of `x` cannot hold becomes infinite.
    """
    host = machine.to_numpy
    shared = layer._replace(shared={name: host(array) for name, array in layer.shared.items()}).shared_experts
    rows = []
    for token in sample:
        ids, weights = host(routing.topk_ids[token]), host(routing.topk_weights[token])
        met = {name: np.stack([host(array[int(e)]) for e in ids]) for name, array in layer.stack.items()}
        as_run = cumoe.Routing(np.arange(ids.size, dtype=np.int32)[None], weights[None])
        experts = layer._replace(stack=met).experts()
        tokens = host(x[token : token + 1])
        rows.append(cumoe.reference.moe(tokens, as_run, experts, shared, weight_on=layer.family.weight_on)[0])
    exact = np.array(rows).reshape(len(sample), x.shape[1])
    with np.errstate(over="ignore"):
        exact[~np.isfinite(exact.astype(x.dtype)).all(1)] = np.inf
    return exact
