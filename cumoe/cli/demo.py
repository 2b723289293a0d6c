"""``cumoe demo``: one layer, measured and checked."""

from argparse import Namespace
from dataclasses import replace
from typing import Any

import numpy as np

import cumoe
from cumoe.bench.replication import replicate
from cumoe.cli.families import FAMILIES, Family
from cumoe.cli.files import DTYPES, check_writable, read_states, write_states
from cumoe.cli.layer import Layer, draw_layer, draw_tokens
from cumoe.cli.machine import Machine, choose_machine
from cumoe.cli.measure import Measurement, by_definition, measure, relative_difference, sample_of
from cumoe.cli.refusal import Refusal
from cumoe.cli.report import describe, print_pair, print_routing, print_table

TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 2e-2}
"""Largest relative error that rounding explains; the replication also rounds its copies, rows and sums."""


def demo(options: Namespace) -> int:
    """Run the demo; return 0, or 1 if a result is wrong.

    Raises
    ------
    Refusal
        If something that the user gave cannot be used.
    """
    states = None
    if options.input is not None:
        if options.tokens is not None or options.dtype is not None:
            raise Refusal("--input: expected neither --tokens nor --dtype beside it, the file decides")
        states = read_states(options.input)
    if options.output is not None:
        check_writable(options.output)
    machine, trouble = choose_machine(options.device)
    if trouble:
        print_pair("note", f"{trouble}; running on the CPU")
    x, origin = _tokens(options, machine, states)
    family = _family(options, machine, x)
    print_pair("device", machine.name)
    print_pair("model", f"{options.family}: {FAMILIES[options.family].model}")
    print_pair("layer", describe(family))
    print_pair("tokens", f"{x.shape} {x.dtype.name}, {origin}")
    layer = draw_layer(machine.xp, options.seed, family, x.dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # tokens from a file may be infinite, or become so in float16
        y, is_right = _compare(layer, x, machine)
    if options.output is not None:
        write_states(options.output, y.reshape(y.shape if states is None else states.shape))
        print_pair("saved", str(options.output))
    return 0 if is_right else 1


def _tokens(options: Namespace, machine: Machine, states: Any) -> tuple[Any, str]:
    """Return the tokens as (num_tokens, hidden_size) on the machine, and where they come from."""
    if states is not None:
        return machine.xp.asarray(states.reshape(-1, states.shape[-1])), f"from {options.input} {states.shape}"
    hidden_size = machine.default_hidden_size or FAMILIES[options.family].hidden_size
    shape = (options.tokens or machine.default_tokens, hidden_size)
    return draw_tokens(machine.xp, options.seed, shape, DTYPES[options.dtype or machine.default_dtype]), "random"


def _family(options: Namespace, machine: Machine, x: Any) -> Family:
    """Return the family at the width of the tokens, at a size that the machine holds."""
    family = FAMILIES[options.family]
    if options.top_k is not None:
        family = replace(family, top_k=options.top_k)
    try:
        family.router().check_experts(family.num_experts, options.family)
    except ValueError as error:
        raise Refusal(f"--top-k: {error}") from None
    return family.fitted(x.shape[1], machine.max_weights(x.dtype.itemsize))


def _compare(layer: Layer, x: Any, machine: Machine) -> tuple[Any, bool]:
    """Measure the layer and what it replaces, print both; return the result and whether everything is right."""
    family, xp = layer.family, machine.xp
    routing = layer.route(x, xp)
    print_routing(machine.to_numpy(cumoe.group(routing.topk_ids, family.num_experts).tokens_per_expert))
    experts, shared, stacked = layer.routed, layer.shared_experts, layer.experts()
    candidates = {"cumoe.moe": lambda: cumoe.moe(x, routing, experts, shared, weight_on=family.weight_on)}
    if family.is_replicable:
        num_tokens, hidden_size = x.shape
        copied = ((family.top_k + 1) * num_tokens, hidden_size)
        print_pair("replicate", f"{x.shape} -> {copied}, shared expert as id {family.num_experts}")
        candidates["replication"] = lambda: replicate(x, routing, stacked, xp)
    measured = measure(candidates, machine)
    sample = sample_of(layer, x.shape[0])
    exact = by_definition(layer, x, routing, sample, machine)
    errors = {name: relative_difference(taken.y[sample], exact) for name, taken in measured.items()}
    print_table(measured, errors, 2 * family.multiplications(x.shape[0]))
    print(f"  error: relative to cumoe.reference in float64 on {len(sample)} of the tokens")
    return measured["cumoe.moe"].y, _verdict(measured, errors, TOLERANCE[x.dtype.name])


def _verdict(measured: dict[str, Measurement], errors: dict[str, float], tolerance: float) -> bool:
    """Print what came out; return whether all results agree."""
    differences = dict(errors)
    ours, theirs = measured["cumoe.moe"], measured.get("replication")
    if theirs is not None:
        differences["each other"] = relative_difference(theirs.y, ours.y)
        print(f"  the two differ by {differences['each other']:.1e}, over all tokens")
    wrong = {name: value for name, value in differences.items() if not value <= tolerance}
    if wrong:
        listed = ", ".join(f"{name} {value:.1e}" for name, value in wrong.items())
        print_pair("verdict", f"WRONG: a relative difference above {tolerance:g}: {listed}")
    elif theirs is None:
        print_pair("verdict", f"right: within {tolerance:g} of the definition")
    else:
        time, memory = theirs.seconds / ours.seconds, theirs.peak_bytes / max(ours.peak_bytes, 1)
        taken = f"the replication takes {time:.2f} x the time and {memory:.2f} x the extra memory"
        print_pair("verdict", f"the same result; {taken}")
    return not wrong
