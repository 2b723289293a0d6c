"""The table of what was tried: a failure, an error of a tool, a breach and an empty log show in it."""

import json
from pathlib import Path

import evidence
import pytest

TESTS = Path(__file__).resolve().parent
CASE = '<testcase classname="tests.{file}" name="{name}">{inside}</testcase>'


def junit(path, *cases):
    """Write a junit file of (file, what is inside)."""
    body = "".join(CASE.format(file=file, name=f"test_{i}", inside=inside) for i, (file, inside) in enumerate(cases))
    path.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    return path


def test_every_test_file_has_its_subject():
    """A file that is renamed falls out of its row."""
    named = {file for files in evidence.SUBJECTS.values() for file in files.split()}
    assert named <= {path.stem for path in TESTS.glob("test_*.py")}


def test_tests_are_counted_by_subject(tmp_path):
    """Skipped ones do not count, failed ones show."""
    path = junit(
        tmp_path / "gpu.xml", ("test_moe", ""), ("test_layer", ""), ("test_moe", "<skipped/>"),
        ("test_limits", '<failure message="m"/>'), ("test_limits", ""), ("test_cli", ""),
    )  # fmt: skip
    assert evidence.table([path]).splitlines()[2:] == [
        "| layers, stages and options against float64 | GPU | 2 tests | all hold |",
        "| limits of sizes and arrays | GPU | 2 tests | **1 fail** |",
        f"| {evidence.OTHERS} | GPU | 1 tests | all hold |",
    ]


@pytest.mark.parametrize(
    ("log", "result"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", "0 errors"),
        ("========= ERROR SUMMARY: 3 errors\n", "**3 errors**"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "0 errors"),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", "**2 errors**"),
        ("========= COMPUTE-SANITIZER\n", "no summary in the log"),
    ],
)
def test_logs_of_sanitizers(tmp_path, log, result):
    """Their own count of errors, and how many tests ran under them."""
    path = tmp_path / "racecheck.log"
    path.write_text(log)
    tests = junit(tmp_path / "racecheck.xml", ("test_moe", ""), ("test_moe", "<skipped/>"))
    rows = evidence.table([tests, path]).splitlines()[2:]
    assert rows == [f"| compute-sanitizer racecheck | GPU | 1 tests at small shapes | {result} |"]


@pytest.mark.parametrize(("breaches", "result"), [(0, "all hold"), (2, "**2 do not hold**")])
def test_counts_of_random_layers(tmp_path, breaches, result):
    """With the seed, which gives the same layers again."""
    path = tmp_path / "fuzz.json"
    counts = {"cases": 2000, "exact": 1100, "runs with the same bits": 9000, "graph replays with the same bits": 30}
    path.write_text(json.dumps({"where": "CPU", "seed": 5, "breaches": breaches, "seconds": 1, "counts": counts}))
    (row,) = evidence.table([path]).splitlines()[2:]
    often = "2,000 cases, 1,100 of them compared to the last bit; 9,030 runs; seed 5"
    assert row == f"| random layers, the whole contract | CPU | {often} | {result} |"
