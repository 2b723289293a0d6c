"""Pytest plugin: `cupy` and the driver are fake from here on; the GPU half of the package's tests runs on the CPU.

    python -m pytest -p cuda_on_cpu.plugin -m gpu tests/test_route.py

Properties are tried on fewer examples than on a GPU, the same ones every time.
"""

import json
import sys

import hypothesis
import pytest

from cuda_on_cpu import fake_cupy

sys.modules["cupy"] = fake_cupy  # type: ignore[assignment]

from cumoe.gpu import driver  # noqa: E402 - not before its `cupy` is there

driver.driver = lambda: fake_cupy.DRIVER  # type: ignore[assignment]

MAX_EXAMPLES = 30


def pytest_collection() -> None:
    """Take examples from a fixed seed; tests that say how many they want inherit the rest."""
    base = hypothesis.settings.get_profile("cumoe")
    hypothesis.settings.register_profile(
        "cuda_on_cpu", base, derandomize=True, database=None, max_examples=MAX_EXAMPLES
    )
    hypothesis.settings.load_profile("cuda_on_cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cap the number of examples where a test says how many it wants."""
    for item in items:
        function = getattr(item, "obj", None)
        own = getattr(function, "_hypothesis_internal_use_settings", None)
        if own is not None and own.max_examples > MAX_EXAMPLES:
            function._hypothesis_internal_use_settings = hypothesis.settings(own, max_examples=MAX_EXAMPLES)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was launched: a test that launches nothing proves nothing about kernels."""
    terminalreporter.write_line(f"kernels launched: {json.dumps(fake_cupy.num_launches)}")
