"""Pytest plugin: the GPU tests as compute-sanitizer can bear them, in mixed order and for so many seconds.

    SECONDS_OF_TESTS=240 compute-sanitizer --tool memcheck python -m pytest -p small_shapes -m gpu tests

Left out are tests that launch no kernel, start processes of their own, or are about sizes. Of the rest those for which
time does not last are skipped; the order is shuffled with a fixed seed, so that all subjects are among those that run.
"""

import os
import random
import time

import few_examples
import pytest

MAX_EXAMPLES = 4
FUZZ_CASES = 60
LEFT_OUT = (
    *("test_refusals", "test_large.py", "test_faults", "test_cli", "test_bench", "test_checkpoint", "test_readme.py"),
    *("test_handover_gpu.py", "test_interop.py"),
)
TOO_LARGE = (
    *("many_tokens", "many_slots", "takes_all", "two_bytes_count", "not_square", "more_stacks_and_tiles", "test_sizes"),
    *("every_expert", "test_threads", "replays"),
)

_until = time.monotonic() + float(os.environ.get("SECONDS_OF_TESTS", "inf"))


def pytest_collection() -> None:
    """Load the profile with few examples."""
    few_examples.begin(MAX_EXAMPLES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose and shuffle."""
    few_examples.cap(items, MAX_EXAMPLES)
    chosen, others = [], []
    for item in items:
        left_out = item.path.name.startswith(LEFT_OUT) or any(word in item.name for word in TOO_LARGE)
        (others if left_out else chosen).append(item)
        if item.path.name == "test_fuzz.py":
            item.module.NUM_CASES["gpu"] = FUZZ_CASES  # type: ignore[attr-defined]
    random.Random(0).shuffle(chosen)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def pytest_runtest_setup() -> None:
    """Skip what there is no time for."""
    if time.monotonic() > _until:
        pytest.skip("time is up")
