"""What has to hold for every case; a breach is a `ContractError`, which says which clause, and where.

1. Right: each element is the exact one, or within the case's bound of it, though all memory was NaN.
2. Still: nothing that came in was changed.
3. Same: the same bits again; on other streams and from a graph as well, where there are any.
4. Confined: NaN and infinity in tokens, factors and experts reach the rows that select them and no others.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

import cumoe
from fuzz.draw import Case, View
from fuzz.truth import Truth, truth

AGAIN, MANY_TIMES, EVERY = 2, 20, 40
"""Runs of a case; of every 40th case more."""
REPLAYS = 3


class ContractError(AssertionError):
    """A clause of the contract does not hold."""


def check(case: Case, place: Any, number: int, count: Counter[str]) -> None:
    """Fail with `ContractError` unless the whole contract holds; add to `count` what was tried."""
    right = truth(case)
    layer = Layer(case, place)
    clean = layer.run()
    if problem := right.wrong(clean):
        raise ContractError(f"not right: {problem}")
    count["exact" if right.exact else "within a bound"] += 1
    count["elements"] += clean.size
    layer.check_still()
    count["runs with the same bits"] += check_same(layer, clean, MANY_TIMES if number % EVERY == 0 else AGAIN)
    if place.streams:
        count["graph replays with the same bits"] += check_graph(layer, clean)
    if case.num_tokens:
        count["with NaN or infinity confined"] += check_confined(case, place, clean, right, number)
    count["cases"] += 1


class Layer:
    """A case where it runs."""

    def __init__(self, case: Case, place: Any) -> None:
        self.place, move = place, place.move

        def made(parts: dict[str, Any]) -> dict[str, Any]:
            return {name: part.on(move) if isinstance(part, View) else part for name, part in parts.items()}

        self.case = case
        self.x = case.x.on(move)
        self.weight_on = case.weight_on
        self.experts = cumoe.Experts(**made(case.experts))
        self.shared = [cumoe.SharedExperts(**made(parts)) for parts in case.shared]
        self.inputs = [self.x, self.experts.weights.w_gate_up, self.experts.weights.w_down]
        self.layer: cumoe.MoE | None = None
        self.routing: cumoe.Routing | None = None
        if case.router is None:
            assert case.ids is not None and case.weights is not None
            self.routing = cumoe.Routing(case.ids.on(move), case.weights.on(move))
            self.inputs += self.routing
        else:
            assert case.router_weight is not None
            bias, output_bias = (None if bias is None else move(bias) for bias in (case.router_bias, case.output_bias))
            self.layer = cumoe.MoE(
                case.router, self.experts, self.shared, weight_on=case.weight_on,
                router_weight=case.router_weight.on(move), router_bias=bias,
                output_bias=output_bias, num_identity_experts=case.num_identity_experts,
            )  # fmt: skip
        self.came = [place.back(array).tobytes() for array in self.inputs]

    def call(self, out: Any = None) -> Any:
        """Compute once."""
        if self.layer is not None:
            return self.layer(self.x, out=out)
        return cumoe.moe(self.x, self.routing, self.experts, self.shared, weight_on=self.weight_on, out=out)

    def run(self) -> np.ndarray:
        """Compute once in memory that is NaN; return a NumPy array."""
        if self.layer is not None:
            self.place.poison_layer(self.layer)
        with self.place.poisoned():
            return self.place.back(self.call())

    def check_still(self) -> None:
        """Fail if an input has changed."""
        for number, (array, came) in enumerate(zip(self.inputs, self.came, strict=True)):
            if self.place.back(array).tobytes() != came:
                raise ContractError(f"not still: input {number}")


def check_same(layer: Layer, clean: np.ndarray, times: int) -> int:
    """Compute again and again, into a given array and over the tokens as well; return how often."""
    place, wanted = layer.place, clean.tobytes()
    for i in range(times):
        if layer.run().tobytes() != wanted:
            raise ContractError(f"not the same: run {i + 2}")
    nan = np.full(clean.shape, np.nan, clean.dtype)
    out = place.move(nan)
    if layer.call(out) is not out or place.back(out).tobytes() != wanted:
        raise ContractError("not the same: into a given array")
    if layer.x.flags.c_contiguous or place.name == "cpu":
        if place.back(layer.call(layer.x)).tobytes() != wanted:
            raise ContractError("not the same: over the tokens")
        layer.x[...] = place.move(np.ascontiguousarray(layer.case.x.array))
        times += 1
    if place.streams:
        with place.elsewhere():
            elsewhere = layer.run()
        if elsewhere.tobytes() != wanted:
            raise ContractError("not the same: on another stream")
        times += 1
    return times + 1


def check_graph(layer: Layer, clean: np.ndarray) -> int:
    """Capture a call of a layer that keeps its memory, and replay it; return how often."""
    if layer.layer is None or clean.size == 0:
        return 0
    place = layer.place
    with place.elsewhere() as stream:
        out = place.move(np.full(clean.shape, np.nan, clean.dtype))
        layer.call(out)
        stream.begin_capture()
        layer.call(out)
        graph = stream.end_capture()
        for replay in range(REPLAYS):
            out.view(np.uint8).fill(255)
            place.poison_layer(layer.layer)
            graph.launch(stream)
            stream.synchronize()
            if place.back(out).tobytes() != clean.tobytes():
                raise ContractError(f"not the same: replay {replay}")
    return REPLAYS


def check_confined(case: Case, place: Any, clean: np.ndarray, right: Truth, number: int) -> int:
    """Spoil a few tokens, factors and experts, and all experts that nobody selects; return 1."""
    rng = np.random.default_rng((number, 1))
    bad_value = (np.nan, np.nan, np.inf, -np.inf)[rng.integers(4)]
    chosen = np.unique(right.topk_ids[right.topk_ids >= 0])
    bad_experts = np.setdiff1d(np.arange(case.num_experts), chosen)
    if len(chosen) > 1 and rng.random() < 0.5:
        bad_experts = np.append(bad_experts, rng.choice(chosen))
    bad_tokens = np.flatnonzero(rng.random(case.num_tokens) < 0.15)
    everywhere = rng.random() < 0.5

    def spoil(array: np.ndarray, which: np.ndarray) -> None:
        for i in which:
            array[(i, ..., slice(None) if everywhere else rng.integers(array.shape[-1]))] = bad_value

    experts = dict(case.experts)
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        if name in experts:
            experts[name] = experts[name].changed(lambda array: spoil(array, bad_experts))
    x = case.x.changed(lambda array: spoil(array, bad_tokens))
    touched = np.isin(right.topk_ids, bad_experts).any(axis=1)
    has_rows = (right.topk_ids >= 0).any(axis=1) | bool(case.shared) | (case.router is not None)
    touched[bad_tokens] |= has_rows[bad_tokens]
    weights = case.weights
    if weights is not None:
        bad_slots = rng.random(right.topk_ids.shape) < 0.05
        weights = weights.changed(lambda array: array.__setitem__(bad_slots, np.nan))
        touched |= (bad_slots & (right.topk_ids >= 0)).any(axis=1)
    spoiled = Layer(replace(case, x=x, experts=experts, weights=weights), place).run()
    # NumPy's products depend on how many rows an expert has, and a token of NaN is routed elsewhere.
    other_batch = place.name == "cpu" and case.router is not None
    if other_batch and (problem := right.wrong(spoiled, ~touched)):
        raise ContractError(f"not confined: {bad_value}: {problem}")
    if not other_batch and spoiled[~touched].tobytes() != clean[~touched].tobytes():
        differs = (spoiled != clean).any(axis=1) & ~touched
        raise ContractError(f"not confined: {bad_value} reached rows {np.flatnonzero(differs)[:9]}")
    if np.isnan(bad_value) and not np.isnan(spoiled[touched].astype(np.float32)).any(axis=1).all():
        raise ContractError("not confined: NaN was lost in a row that selects it")
    return 1
