"""``cumoe inspect`` and ``cumoe run``: what a checkpoint holds, and a layer of it on hidden states from a file."""

from argparse import Namespace
from typing import Any

import numpy as np

import cumoe
from cumoe.cli.files import check_writable, read_ids, read_states, write_states
from cumoe.cli.machine import choose_machine
from cumoe.cli.refusal import Refusal
from cumoe.cli.report import print_pair

COLUMNS = ("layer", "hidden", "experts", "size", "top k", "shared", "dtype", "MiB")


def inspect(options: Namespace) -> int:
    """Print a line a layer with experts; return 0.

    Raises
    ------
    Refusal
        If the checkpoint cannot be read.
    """
    found = _refusing(cumoe.layers, options.path)
    if not found:
        raise Refusal(f"{options.path}: expected a layer with experts, got dense layers only")
    print_pair("family", found[0].family)
    print_pair("layers", f"{len(found)} with experts")
    rows = [
        (
            s.layer,
            s.hidden_size,
            s.num_experts,
            s.intermediate_size,
            s.top_k,
            s.shared_intermediate_size or "-",
            s.dtype,
        )
        for s in found
    ]
    lines = [COLUMNS, *((*map(str, row), f"{s.num_bytes / 2**20:.1f}") for row, s in zip(rows, found, strict=True))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    return 0


def run(options: Namespace) -> int:
    """Load a layer, run it on hidden states from a file and save what comes out, in their dtype and shape; return 0.

    Raises
    ------
    Refusal
        If something that the user gave cannot be used.
    """
    states = read_states(options.input)
    check_writable(options.output)
    input_ids = None if options.input_ids is None else read_ids(options.input_ids)
    machine, trouble = choose_machine(options.device)
    if trouble:
        print_pair("note", f"{trouble}; running on the CPU")
    device = "cpu" if machine.xp is np else "gpu"
    layer = _refusing(cumoe.load, options.path, options.layer, device=device)
    print_pair("device", machine.name)
    print_pair("layer", f"{options.layer}: {layer}")
    x = states.reshape(-1, states.shape[-1])
    if x.dtype != layer.experts.dtype:
        print_pair("note", f"hidden states of {x.dtype.name} are converted to {layer.experts.dtype.name}, the layer's")
    with np.errstate(over="ignore", invalid="ignore"):  # tokens from a file may be infinite, or become so in float16
        tokens = machine.xp.asarray(x.astype(layer.experts.dtype))
        ids = None if input_ids is None else machine.xp.asarray(input_ids.ravel())
        y = machine.to_numpy(_refusing(layer, tokens, input_ids=ids)).astype(states.dtype)
    write_states(options.output, y.reshape(states.shape))
    print_pair("saved", f"{options.output} {states.shape} {states.dtype.name}")
    return 0


def _refusing(call: Any, *arguments: Any, **options: Any) -> Any:
    """Call; turn what the library raises about its arguments into a refusal of one line."""
    try:
        return call(*arguments, **options)
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise Refusal(" ".join(str(error).split())) from None
