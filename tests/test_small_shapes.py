"""The tests that a tool of compute-sanitizer runs: parts that make the whole, and an end in time."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import small_shapes

TESTS = Path(__file__).resolve().parent
SLOW = """
import time
import pytest
pytestmark = pytest.mark.gpu
def test_short(): pass
def test_long(): [time.sleep(0.01) for _ in range(3000)]
"""


@pytest.fixture
def slow(tmp_path):
    """Return a file of a short test and a long one, away from the conftest that skips both without a GPU."""
    (tmp_path / "conftest.py").write_text("import hypothesis\nhypothesis.settings.register_profile('cumoe')\n")
    path = tmp_path / "test_slow.py"
    path.write_text(SLOW)
    return path


def run(*arguments, **environment):
    """Run pytest with the plugin, as a machine with a GPU would."""
    changed = {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))), "PYTEST_ADDOPTS": ""} | environment
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "small_shapes", "-m", "gpu", *arguments],
        env=os.environ | changed, cwd=TESTS.parent, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def collected(*arguments, **environment):
    """Return the tests that a process would run, in order."""
    done = run("--collect-only", *arguments, **environment)
    assert done.returncode == 0, done.stdout
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.parametrize("number", [1, 2, 3, 8, 50])
def test_parts_make_the_whole(number):
    """Each item is in one of them, and they are about as long."""
    parts = [small_shapes.part_of(range(41), f"{i + 1}/{number}") for i in range(number)]
    assert sorted(item for part in parts for item in part) == list(range(41))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert small_shapes.part_of("abcdefgh", "3/4") == ["c", "g"]


@pytest.mark.parametrize("shard", ["", "0/3", "4/3", "3", "1/2/3", "a/b"])
def test_parts_that_are_none(shard):
    """They are refused before anything runs."""
    with pytest.raises(pytest.UsageError, match="SHARD: expected a number and how many there are, like 3/8, got"):
        small_shapes.part_of([], shard)


def test_processes_share_the_tests():
    """Each chooses and shuffles alike; together they have every test once, and no test of the CPU."""
    files = [str(TESTS / name) for name in ("test_group.py", "test_fuzz.py")]
    whole = collected(*files, SANITIZER="synccheck")
    parts = [collected(*files, SANITIZER="synccheck", SHARD=f"{i}/3") for i in (1, 2, 3)]
    assert [part == whole[i::3] for i, part in enumerate(parts)] == [True] * 3
    assert len(set(whole)) == len(whole) > 50
    assert any("test_the_contract_holds[gpu]" in name for name in whole)
    assert not any("[cpu" in name or "50021" in name for name in whole)


def test_what_repeats_comes_last():
    """The other type of 16 bits launches the same; if time is up, it is these tests that have not run."""
    repeats = [re.search(r"\bfloat16\b", name) is not None for name in collected(str(TESTS / "test_moe.py"))]
    assert 5 < sum(repeats) < len(repeats) - 5
    assert repeats == sorted(repeats)


def test_the_whole_suite_is_chosen_from():
    """Nothing that is named here has been renamed, and racecheck has the same tests but for a few."""
    everything = {line.split("::")[1].partition("[")[0] for line in collected("-p", "no:small_shapes", str(TESTS))}
    named = {name for names in (small_shapes.SMALL, *small_shapes.SMALL_BY_TOOL.values()) for name in names}
    assert named <= everything
    assert all(any(name.startswith(word) for name in everything) for word in small_shapes.LEFT_OUT)
    assert all(list(TESTS.glob(f"{word}*")) for word in small_shapes.NOT_COLLECTED)
    most, fewer = (set(collected(str(TESTS), SANITIZER=tool)) for tool in ("memcheck", "racecheck"))
    assert not any("test_large" in name for name in most)
    assert fewer < most and len(most) > 1600 and len(most - fewer) < 40


@pytest.mark.parametrize(
    ("seconds", "long", "short"),
    [({"SECONDS_A_TEST": "0.3"}, "cut off after 0 s", None), ({"SECONDS_OF_TESTS": "0"}, "time is up", "time is up")],
)
def test_time_ends(slow, tmp_path, seconds, long, short):
    """What takes too long is cut off, what comes too late is skipped; the record says so, and how many there were."""
    record = tmp_path / "record.xml"
    done = run("-c", "pyproject.toml", "--junitxml", str(record), str(slow), **seconds)
    assert done.returncode == 0, done.stdout
    found = ElementTree.parse(record)
    reasons = {case.get("name"): case.find("skipped") for case in found.iter("testcase")}
    said = {name: None if reason is None else reason.get("message") for name, reason in reasons.items()}
    assert said == {"test_long": long, "test_short": short}
    assert [each.get("value") for each in found.iter("property") if each.get("name") == "chosen"] == ["2"]


def test_a_failure_is_told_at_once(slow):
    """Before the next test is begun."""
    slow.write_text(SLOW + "def test_a_fault(): raise ValueError('of memory')\ndef test_behind(): pass\n")
    done = run("-c", "pyproject.toml", "-k", "fault or behind", "-v", str(slow))
    told = [line for line in done.stdout.split("= FAILURES =")[0].splitlines() if line.startswith("FAILED ")]
    assert done.returncode == 1 and len(told) == 1, done.stdout
    assert told[0].endswith("::test_a_fault: ValueError: of memory")


def test_cached_memory_is_given_back_after_every_test(slow):
    """Where CuPy's pool has a limit."""
    slow.write_text(
        """
import sys, types
import pytest
pytestmark = pytest.mark.gpu
calls = []
pool = types.SimpleNamespace(free_all_blocks=lambda: calls.append("freed"))
sys.modules["cupy"] = types.SimpleNamespace(get_default_memory_pool=lambda: pool)
@pytest.mark.parametrize("number", range(3))
def test_counts(number): print("freed", len(calls))
"""
    )
    for environment, counts in (({"CUPY_GPU_MEMORY_LIMIT": "4096"}, "012"), ({}, "000")):
        done = run("-c", "pyproject.toml", "-s", str(slow), **environment)
        assert re.findall(r"freed (\d)", done.stdout) == list(counts), done.stdout


def test_a_part_without_tests_is_fine(slow):
    """There may be more processes than tests."""
    done = run("-c", "pyproject.toml", str(slow), SHARD="3/3")
    assert done.returncode == 0 and "2 deselected" in done.stdout, done.stdout
