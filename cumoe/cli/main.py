"""The command line: ``cumoe doctor``, ``demo``, ``inspect``, ``run``, ``bench``, ``plot`` and ``config``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import cumoe
from cumoe.bench.baselines import BASELINES
from cumoe.bench.distributions import WORDS
from cumoe.bench.shapes import NUM_TOKENS, SHAPES
from cumoe.cli.bench import bench
from cumoe.cli.checkpoint import inspect, run
from cumoe.cli.demo import demo
from cumoe.cli.families import FAMILIES
from cumoe.cli.files import DTYPES
from cumoe.cli.plot import KINDS, plot
from cumoe.cli.refusal import Refusal
from cumoe.doctor.main import DESCRIPTION as DOCTOR
from cumoe.doctor.main import add_options, doctor
from cumoe.layer.moe import WEIGHT_ON
from cumoe.plot.style import THEMES

COMMANDS = {"doctor": doctor, "demo": demo, "inspect": inspect, "run": run, "bench": bench, "plot": plot}

DEVICE: dict[str, Any] = {
    "choices": ("auto", "gpu", "cpu"), "default": "auto", "help": "default: a GPU if there is one",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        """Write what is wrong to stderr and exit with 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def count(text: str) -> int:
    """Return a positive int."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an int of at least 1, got {text!r}")
    return value


def parser() -> Parser:
    """Return the parser of all commands."""
    top = Parser(prog="cumoe", description="Mixture-of-Experts layers on NVIDIA GPUs with CuPy and NumPy alone.")
    top.add_argument("--version", action="version", version=f"cumoe {cumoe.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="{doctor,demo,inspect,run,bench,plot,config}")
    commands.add_parser("config", help="print versions and devices")
    add_options(commands.add_parser("doctor", help="find out what works, and how to mend the rest", description=DOCTOR))
    _add_checkpoint_commands(commands)
    _add_bench(commands)
    _add_plot(commands)
    show = commands.add_parser(
        "demo",
        help="run a layer and compare it with the definition",
        description="Run one layer with random weights, on the GPU if there is one. Compare it with the definition in "
        "float64 and, where the routing weight goes on the input, with the copied tokens that it replaces.",
    )
    show.add_argument("--family", choices=tuple(FAMILIES), default="llama4", help="whose layer (default: %(default)s)")
    show.add_argument("--device", **DEVICE)
    show.add_argument("--tokens", type=count, metavar="N", help="default: 4096 on a GPU, 512 on a CPU")
    show.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    show.add_argument("--top-k", type=count, metavar="K", help="experts a token; default: the family's")
    show.add_argument("--seed", type=int, default=0, metavar="S", help="of weights and tokens (default: %(default)s)")
    show.add_argument(
        "--input", type=Path, metavar="X.npy", help="hidden states, (tokens, hidden) or (batch, seq, hidden)"
    )
    show.add_argument("--output", type=Path, metavar="Y.npy", help="where to save the result, shaped like the input")
    return top


def _add_checkpoint_commands(commands: Any) -> None:
    look = commands.add_parser("inspect", help="list the layers with experts of a checkpoint")
    use = commands.add_parser("run", help="run a layer of a checkpoint on hidden states from a file")
    for command in (look, use):
        command.add_argument("path", type=Path, metavar="PATH", help="a folder with config.json and safetensors files")
    use.add_argument("--layer", type=int, required=True, metavar="N", help="its number in the model, from 0")
    use.add_argument(
        "--input", type=Path, required=True, metavar="X.npy", help="(tokens, hidden) or (batch, seq, hidden)"
    )
    use.add_argument("--output", type=Path, required=True, metavar="Y.npy", help="where to save the result")
    use.add_argument("--input-ids", type=Path, metavar="IDS.npy", help="for layers that choose experts by token id")
    use.add_argument("--device", **DEVICE)


def _add_bench(commands: Any) -> None:
    time = commands.add_parser(
        "bench",
        help="time published layers on the GPU",
        description="Time cumoe.moe at the sizes of published layers, replayed from a CUDA graph with a cold L2 cache, "
        "beside the least that cuBLAS's rate and the memory's bandwidth, measured first, would allow, and beside other "
        "ways to compute the same.",
    )
    layers, tokens = tuple(SHAPES), " ".join(map(str, NUM_TOKENS))
    time.add_argument("--layers", nargs="+", choices=layers, default=layers, metavar="NAME", help=", ".join(layers))
    time.add_argument("--tokens", nargs="+", type=count, default=NUM_TOKENS, metavar="N", help=f"default: {tokens}")
    time.add_argument("--weight-on", choices=WEIGHT_ON, help="default: where the layer has them")
    time.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: %(default)s")
    time.add_argument("--host", action="store_true", help="what calls of cumoe.MoE cost the host, instead")
    time.add_argument("--stages", action="store_true", help="what each stage of cumoe.MoE takes, instead")
    time.add_argument("--routing", nargs="+", default=["uniform"], metavar="HOW", help=f"{WORDS}; default: uniform")
    baselines = tuple(BASELINES)
    about = "; ".join(f"{name}: {baseline.what}" for name, baseline in BASELINES.items())
    time.add_argument("--baselines", nargs="*", choices=baselines, default=baselines, metavar="NAME", help=about)
    time.add_argument("--csv", type=Path, metavar="FILE", help="where to save the table too")


def _add_plot(commands: Any) -> None:
    draw = commands.add_parser(
        "plot",
        help="draw pictures from the files of bench",
        description="Draw a picture: roofline, models, imbalance and timeline from CSV files; load from a routing; "
        "flow and roles, which explain the layer and its kernel, from nothing.",
    )
    draw.add_argument("kind", choices=KINDS, help=f"one of {', '.join(KINDS)}", metavar="KIND")
    draw.add_argument("--csv", nargs="+", type=Path, default=[], metavar="FILE", help="files that bench has saved")
    draw.add_argument("--output", type=Path, metavar="FILE", help="ends in .svg, .png or .pdf")
    draw.add_argument(
        "--theme", nargs="+", choices=tuple(THEMES), default=["light"], metavar="NAME",
        help="light, dark, or both: then each file has its theme in its name",
    )  # fmt: skip
    draw.add_argument("--trace", type=Path, metavar="FILE.json", help="timeline as a trace for chrome://tracing")
    draw.add_argument("--layer", choices=tuple(SHAPES), default="Qwen3-30B-A3B", metavar="NAME", help="of load")
    draw.add_argument("--tokens", type=count, default=4096, metavar="N", help="of load (default: %(default)s)")
    draw.add_argument(
        "--routing", nargs="+", default=["balanced", "uniform", "zipf:1", "one-hot"], metavar="HOW",
        help=f"of load, at most 6: {WORDS}",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 is success, 1 a wrong result, 2 a refusal."""
    options = parser().parse_args(arguments)
    if options.command == "config":
        cumoe.show_config()
        return 0
    try:
        return COMMANDS[options.command](options)
    except Refusal as refusal:
        print(f"cumoe {options.command}: {refusal}", file=sys.stderr)
    except MemoryError as error:
        what = f"{options.tokens or 'these'} tokens" if options.command == "demo" else "the layer and these tokens"
        print(f"cumoe {options.command}: not enough memory for {what}: {error}", file=sys.stderr)
    return 2
