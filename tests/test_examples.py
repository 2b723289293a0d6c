"""The examples: each runs as its first lines say."""

import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import cumoe.examples

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {"torch_model": ("torch", "transformers"), "jax_layer": ("jax",)}
NAMES = sorted(module.name for module in pkgutil.iter_modules(cumoe.examples.__path__))


@pytest.mark.parametrize("name", NAMES)
def test_example(name, tmp_path):
    """The command of its docstring ends well, and says so."""
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    source = Path(importlib.util.find_spec(f"cumoe.examples.{name}").origin).read_text(encoding="utf-8")
    (command,) = re.findall(r"^    python (-m .*)$", source, re.MULTILINE)
    assert f"cumoe.examples.{name}" in command
    more = ["-p", "no:cacheprovider", "-q"] if "pytest" in command else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CI": "true"}  # hypothesis does not mind a busy machine then
    done = subprocess.run(
        [sys.executable, *shlex.split(command), *more],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"difference|the same as|3 passed", done.stdout), done.stdout


def test_every_example_is_here():
    """Those that the README speaks of."""
    assert {"torch_model", "jax_layer", "batches", "router_property"} == set(NAMES)
