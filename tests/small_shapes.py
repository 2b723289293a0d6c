"""Pytest plugin: the GPU tests as compute-sanitizer bears them: one part of them, in mixed order, for so many seconds.

    SANITIZER=racecheck SHARD=3/8 SECONDS_OF_TESTS=400 python -m pytest -p small_shapes -m gpu tests

is what `compute-sanitizer --tool racecheck` is given. Every process shuffles the chosen tests with the same seed;
SHARD=3/8 takes every eighth of them from the third on. Those for which no time is left are skipped, and one that takes
more than SECONDS_A_TEST is cut off. The junit file has how long each took and why one was skipped, and at the first of
them, as the property `chosen`, how many tests all parts have together. Why a test failed is said at once, since a
process that is ended has no summary.
"""

import gc
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypeVar

import few_examples
import pytest

Item = TypeVar("Item")


class Tool(NamedTuple):
    """What a tool can bear."""

    max_examples: int = 4  # of a property
    fuzz_cases: int = 20
    pool: str = "kept"  # "none": every array is an allocation of its own, so its bounds and its bytes are known


TOOLS = {
    "memcheck": Tool(pool="none"),
    "initcheck": Tool(pool="none"),
    "synccheck": Tool(),
    "racecheck": Tool(max_examples=2, fuzz_cases=4),
}

NOT_COLLECTED = (
    "test_large.py",  # 2^31 elements and more: gigabytes a process
    *("test_readme.py", "test_doctor.py", "test_faults_processes.py", "test_faults_compiler.py"),  # other processes
    *("test_bench", "test_cli_bench.py"),  # times, which would be those of the tool; hundreds of replays for each
    *("test_handover_gpu.py", "test_checkpoint_families.py"),  # torch and JAX: gigabytes and minutes for their kernels
    "test_checkpoint_read.py",  # copies between files, the host and the GPU, without a kernel
)
"""Files, or how their names begin."""

LEFT_OUT = (
    "test_refused_",  # raised before anything is launched; the calls that are accepted stay
    "test_a_pool_with_a_limit",  # 2,000,000 tokens
    *("test_a_graph_of_torch", "test_a_call_does_not_wait_for_torch"),  # torch, as above
    "test_the_stream_of_an_interface_is_waited",  # the host must not wait; under a tool it does
)
"""Tests, as how their names begin."""

SMALL: dict[str, Callable[..., bool]] = {
    # Beyond these there is more of the same: many blocks sort from 4097 slots on.
    "test_many_slots": lambda num_tokens, top_k, **_: num_tokens * top_k <= 20_000,
    "test_one_row_and_a_grid_that_is_not_square": lambda n, k, **_: n * k <= 1 << 20,  # others draw 33 million numbers
}
"""By the name of a test: which of its parameters are small."""

SMALL_BY_TOOL: dict[str, dict[str, Callable[..., bool]]] = {
    # Every launch takes tens of milliseconds there, and it looks at shared memory alone: what repeats the same launches
    # for another dtype, or with 65,000 rows instead of 1000, shows nothing new.
    "racecheck": {
        "test_any_allocation_of_a_call_may_fail": lambda dtype, **_: dtype == "bfloat16",
        "test_a_layer_that_cannot_grow_stays_as_it_was": lambda dtype, **_: dtype == "bfloat16",
        "test_every_family": lambda family, **_: family in ("llama4", "gpt_oss"),
        "test_files_keep_shape_and_dtype": lambda dtype, **_: dtype == "bfloat16",
        "test_more_tokens_than_two_bytes_count": lambda **_: False,
        "test_many_tokens": lambda **_: False,
        "test_many_tokens_and_experts_that_are_no_power_of_2": lambda **_: False,
    }
}

SECONDS_AFTER = 20.0
"""How long a test may go on when the time of all is up."""

_until = time.monotonic() + float(os.environ.get("SECONDS_OF_TESTS", "inf"))
_tool = os.environ.get("SANITIZER", "")


def part_of(items: Sequence[Item], shard: str) -> list[Item]:
    """Return every eighth item from the third on for ``"3/8"``."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise pytest.UsageError(f"SHARD: expected a number and how many there are, like 3/8, got {shard!r}")
    return list(items[int(match[1]) - 1 :: int(match[2])])


def is_small(item: pytest.Item) -> bool:
    """Return whether a test is one for the tool."""
    if item.name.startswith(LEFT_OUT):
        return False
    function, params = item.name.partition("[")[0], item.callspec.params if hasattr(item, "callspec") else {}
    return all(small.get(function, lambda **_: True)(**params) for small in (SMALL, SMALL_BY_TOOL.get(_tool, {})))


def repeats_another(item: pytest.Item) -> bool:
    """Return whether a test launches what another one does, for the other type of 16 bits; such tests come last."""
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(isinstance(value, str) and value == "float16" for value in params)


def make_less_of(module: object, tool: Tool) -> None:
    """Let the tests of a module that go through many cases in one go through fewer."""
    name = getattr(module, "__name__", "").rpartition(".")[2]
    if name == "test_fuzz":
        module.NUM_CASES["gpu"] = tool.fuzz_cases  # type: ignore[attr-defined]
    if name == "test_route_and_count":  # two kernels for each of up to 17 routers
        module.EVERY["router"] = 5  # type: ignore[attr-defined]
    if name == "test_cli":  # a demonstration times what it has computed
        from cumoe.cli.machine import Gpu

        Gpu.seconds_to_spend = 0.0
    if name == "test_batches" and _tool == "racecheck":  # of about 60 numbers of tokens, with two calls each
        every = [number for number in module.thresholds() if number <= 600][::8]  # type: ignore[attr-defined]
        module.thresholds = lambda: every  # type: ignore[attr-defined]


def pytest_sessionstart() -> None:
    """Do without CuPy's pool where a tool knows an array by its allocation."""
    if os.environ.get("SANITIZE_POOL", TOOLS.get(_tool, Tool()).pool) == "none":
        import cupy

        cupy.cuda.set_allocator(None)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Not even import what is left out as a whole: some of it imports torch."""
    return True if collection_path.name.startswith(NOT_COLLECTED) else None


def pytest_collection() -> None:
    """Load the profile with few examples."""
    few_examples.begin(TOOLS.get(_tool, Tool()).max_examples)


@pytest.hookimpl(trylast=True)  # behind -m and -k: the parts share what these leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose, shuffle and take this process's part."""
    tool = TOOLS.get(_tool, Tool())
    few_examples.cap(items, tool.max_examples)
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        make_less_of(module, tool)
    chosen = [item for item in items if is_small(item)]
    random.Random(0).shuffle(chosen)
    chosen.sort(key=repeats_another)
    part = part_of(chosen, os.environ.get("SHARD", "1/1"))
    for item in part[:1]:
        item.user_properties.append(("chosen", len(chosen)))
    kept = set(part)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = part


def pytest_runtest_setup() -> None:
    """Skip what there is no time for."""
    if time.monotonic() > _until:
        pytest.skip("time is up")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Cut off what takes too long; a launch that does not come back is left to whoever started this process."""
    seconds = min(float(os.environ.get("SECONDS_A_TEST", "60")), _until + SECONDS_AFTER - time.monotonic())

    def cut_off(number: int, frame: FrameType | None) -> None:
        pytest.skip(f"cut off after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, cut_off)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 5)  # again, should it meet code that lets nothing through
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pytest_runtest_teardown() -> None:
    """Give back what CuPy's pool has cached, for every stream: with a limit it counts that as if it were in use."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and "CUPY_GPU_MEMORY_LIMIT" in os.environ:
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say why a test failed."""
    report = yield
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = str(report.longrepr if crash is None else crash.message)
        item.config.get_terminal_writer().line(f"\nFAILED {report.nodeid}: {reason[:500]}")
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where there are fewer tests than parts, a part without any is fine."""
    if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK
