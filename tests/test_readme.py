"""The README and the docstrings: what they show runs, what they name exists."""

import ast
import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import MIXTRAL, mixtral, write_checkpoint

import cumoe
from cumoe.checkpoint.families import FAMILIES
from cumoe.cli.main import parser
from cumoe.gpu.compile import gpu_is_there

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
METADATA = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
TOP_LEVEL = {"README.md", "cumoe", "kernels", "pyproject.toml", "tests"}


def blocks(language):
    """Return the code blocks of a language."""
    return [body for found, body in BLOCK.findall(README) if found == language]


def python_block(index, body):
    """Return a test parameter; one for the GPU belongs to the GPU half of the tests."""
    marks = [pytest.mark.gpu] if body.startswith("# needs a GPU\n") else []
    return pytest.param(body, id=f"block{index}", marks=marks)


def commands():
    """Return the commands of the bash blocks, one by one."""
    lines = "".join(blocks("bash")).splitlines()
    return [command.strip() for line in lines for command in line.split("&&")]


def in_checkout():
    """Return an environment in which Python finds this checkout, and hypothesis does not mind a busy machine."""
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "CI": "true"}


def test_there_are_blocks():
    """The expressions above find what they look for."""
    assert len(blocks("python")) >= 3
    assert len(commands()) >= 8


@pytest.mark.parametrize("body", [python_block(*item) for item in enumerate(blocks("python"))])
def test_python_block_runs(body, tmp_path):
    """Each block is a program of its own."""
    needs = re.match(r"# needs (.*)\n", body)
    if needs and needs[1] == "a GPU" and not gpu_is_there():
        pytest.skip("no CUDA device")
    if needs and needs[1] != "a GPU":
        pytest.importorskip(needs[1])
    done = subprocess.run(
        [sys.executable, "-c", body], cwd=tmp_path, env=in_checkout(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", commands())
def test_command_is_there(command, tmp_path):
    """Commands of the package run; of scripts the docstring says the same; of others what they are given exists."""
    program, *arguments = shlex.split(command)
    if program.startswith(".ci/"):
        assert os.access(ROOT / program, os.X_OK)
    elif arguments[:3] == ["-m", "cumoe", "bench"]:  # it would take minutes, and a GPU; its options are known
        assert parser().parse_args(arguments[2:]).csv is not None
    elif program.removeprefix(".venv/bin/") == "python" and arguments[:2] == ["-m", "cumoe"]:
        np.save(tmp_path / "x.npy", np.ones((2, 3, 64), np.float32))
        config = MIXTRAL | {"hidden_size": 64}
        tensors = mixtral(np.random.default_rng(0), layers=(1, 2), config=config)
        write_checkpoint(tmp_path / "checkpoint", config, tensors)
        for file in (ROOT / ".ci" / "figures").glob("*.csv"):
            shutil.copy(file, tmp_path)
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=in_checkout(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr
    elif program == "python" and arguments[0].endswith(".py"):  # it may need transformers
        source = (ROOT / arguments[0]).read_text(encoding="utf-8")
        usage = ast.get_docstring(ast.parse(source))
        assert command in " ".join(usage.split())
    elif program.removeprefix(".venv/bin/") == "python":
        assert arguments[0] == "-m"
        assert importlib.util.find_spec(arguments[1]) is not None
    else:
        assert program.removeprefix(".venv/bin/") == "pip"
        extra = re.search(r"\[(\w+)\]", command)
        assert extra is None or re.search(rf"^{extra[1]} = \[", METADATA, re.MULTILINE)
        assert "-e" not in arguments or arguments[arguments.index("-e") + 1].startswith(".")
        named = [package for package in arguments[1:] if not package.startswith(("-", "."))]
        assert all(f'"{package}' in METADATA for package in named)


def test_readme_names_what_exists():
    """Every `cumoe.name` is public or a module, every path and picture lies in the repository."""
    for name in re.findall(r"\bcumoe\.([A-Za-z_.]+\w)", README):
        assert name.split(".")[0] in cumoe.__all__ or importlib.util.find_spec(f"cumoe.{name}") is not None, name
    for path in re.findall(r'(?:src|srcset)="([^"]+)"', README):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"`((?:kernels|tests|\.ci)/[\w.*]+)`", README):
        assert list(ROOT.glob(path)), path


def test_readme_lists_the_families():
    """All of the table, and none besides."""
    listed = re.search(r"Families:\n\n(.*?)\.\n\n", README, re.DOTALL)[1]
    assert sorted(re.split(r",\s+", listed)) == sorted(FAMILIES)


def test_version_is_the_same_everywhere():
    """In the metadata and in the package."""
    assert re.search(r'^version = "([^"]+)"', METADATA, re.MULTILINE)[1] == cumoe.__version__


def test_top_level_of_the_repository():
    """Only these entries and dotfiles."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("git does not list this checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.walk_packages(cumoe.__path__, "cumoe.") if m.name != "cumoe.__main__"]
)
def test_docstring_examples(name):
    """What a docstring shows is what comes out."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in ("jax", "torch", "transformers"):
            raise
        pytest.skip(str(missing))
    assert doctest.testmod(module).failed == 0
