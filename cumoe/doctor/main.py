"""The report: every check is guarded, something is always printed, and each line that is not fine names a cure."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cumoe.doctor.checks import Examination
from cumoe.doctor.finding import Finding, one_line

DESCRIPTION = (
    "Look at everything that cumoe runs on, from Python to the compiled kernels. Exit code 0: what should work here "
    "does; 1: a line says FAIL. Without a GPU the CPU is what should work, and what a GPU would need is noted; with "
    "--gpu that is a failure too."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--gpu", action="store_true", help="a GPU has to work: without one the exit code is 1")
    parser.add_argument("--quick", action="store_true", help="leave out the cold import, which compiles all kernels")


def main(arguments: Sequence[str]) -> int:
    """Run the command with its arguments; return the exit code."""
    parser = argparse.ArgumentParser("cumoe doctor", description=DESCRIPTION)
    add_options(parser)
    return doctor(parser.parse_args(arguments))


def doctor(options: argparse.Namespace) -> int:
    """Print the report; return 0, or 1 if something that should work does not."""
    failed = 0
    for finding in examine(Examination(gpu_is_wanted=options.gpu, quick=options.quick)):
        print(finding, flush=True)
        failed += finding.verdict == "FAIL"
    print(f"{failed} to mend" if failed else "all that should work here does")
    return 1 if failed else 0


def examine(examination: Any) -> Iterator[Finding]:
    """Run all checks; one that breaks is a finding too."""
    for subject, check in examination.checks().items():
        yield from _guarded(subject, check)


def _guarded(subject: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 - a report must always print
        text = f"the check itself failed: {type(error).__name__}: {one_line(error)}"
        yield Finding("FAIL", subject, text, "report this line, with the others, to the project")
