"""Pytest plugin: `cupy` and the driver are fake from here on; the GPU half of the package's tests runs on the CPU.

    python -m pytest -p cuda_on_cpu.plugin -m gpu tests/test_route.py

Properties are tried on fewer examples than on a GPU, the same ones every time.
"""

import json
import sys

import few_examples
import pytest

from cuda_on_cpu import fake_cupy

sys.modules["cupy"] = fake_cupy  # type: ignore[assignment]

from cumoe.gpu import driver  # noqa: E402 - not before its `cupy` is there

driver.driver = lambda: fake_cupy.DRIVER  # type: ignore[assignment]

MAX_EXAMPLES = 30


def pytest_collection() -> None:
    """Load the profile with few examples."""
    few_examples.begin(MAX_EXAMPLES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cap the number of examples where a test says how many it wants."""
    few_examples.cap(items, MAX_EXAMPLES)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was launched: a test that launches nothing proves nothing about kernels."""
    terminalreporter.write_line(f"kernels launched: {json.dumps(fake_cupy.num_launches)}")
