"""The table of what was tried: a failure, an error of a tool, a breach and an empty log show in it."""

import json
from pathlib import Path

import evidence
import pytest

TESTS = Path(__file__).resolve().parent
CASE = '<testcase classname="tests.{file}" name="{name}" time="{seconds}">{inside}</testcase>'


def junit(path, *cases, chosen=None):
    """Write a junit file of (file, what is inside), each test a second longer than the one before."""
    body = "" if chosen is None else f'<properties><property name="chosen" value="{chosen}"/></properties>'
    for i, (file, inside) in enumerate(cases):
        body += CASE.format(file=file, name=f"test_{i}", seconds=i, inside=inside)
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
        ("========= COMPUTE-SANITIZER\n", "**no summary in 1 of 1 logs**"),
    ],
)
def test_logs_of_sanitizers(tmp_path, log, result):
    """Their own count of errors, and how many tests ran under them."""
    path = tmp_path / "racecheck-1of1.log"
    path.write_text(log)
    tests = junit(tmp_path / "racecheck-1of1.xml", ("test_moe", ""), ("test_moe", "<skipped/>"))
    rows = evidence.table([tests, path]).splitlines()[2:]
    assert rows == [f"| compute-sanitizer racecheck | GPU | 1 of 2 tests at small shapes | {result} |"]


def test_parts_of_a_tool_are_one_row(tmp_path):
    """Tests, errors and failures are added up; a part without a log or without tests shows; so does what took long."""
    late, cut = '<skipped message="time is up"/>', '<skipped message="cut off after 60 s"/>'
    junit(tmp_path / "memcheck-1of3.xml", ("test_moe", ""), ("test_moe", late), ("test_moe", late), chosen=9)
    junit(tmp_path / "memcheck-2of3.xml", ("test_moe", ""), ("test_moe", "<failure/>"), ("test_moe", cut), chosen=9)
    junit(tmp_path / "synccheck-1of1.xml", ("test_moe", ""), chosen=1)
    for name, errors in (("memcheck-1of3", 1), ("memcheck-2of3", 2), ("synccheck-1of1", 0)):
        (tmp_path / f"{name}.log").write_text(f"========= ERROR SUMMARY: {errors} errors\n")
    records = sorted(tmp_path.iterdir())
    small = "tests at small shapes"
    said = "**3 errors**, **1 fail**, **no summary in 1 of 3 logs**"
    assert evidence.table(records).splitlines()[2:] == [
        f"| compute-sanitizer memcheck | GPU | 3 of 9 {small} | {said} |",
        f"| compute-sanitizer synccheck | GPU | 1 of 1 {small} | 0 errors |",
    ]
    memcheck, synccheck = evidence.sanitized(records)
    first, *longest = memcheck.details()
    ran, others = "3 of 9 tests ran", "2 had no time left, 1 were cut off, 3 left no record"
    assert first == f"memcheck, 3 parts: {ran}, {others}; longest, in seconds:"
    assert longest[0] == "     2.0  test_moe::test_2  time is up"
    assert longest[1:] == sorted(longest[1:], reverse=True) and len(longest) == 6
    assert synccheck.details()[0] == "synccheck, 1 parts: 1 of 1 tests ran; longest, in seconds:"


@pytest.mark.parametrize(("breaches", "result"), [(0, "all hold"), (2, "**2 do not hold**")])
def test_counts_of_random_layers(tmp_path, breaches, result):
    """With the seed, which gives the same layers again."""
    path = tmp_path / "fuzz.json"
    counts = {"cases": 2000, "exact": 1100, "runs with the same bits": 9000, "graph replays with the same bits": 30}
    path.write_text(json.dumps({"where": "CPU", "seed": 5, "breaches": breaches, "seconds": 1, "counts": counts}))
    (row,) = evidence.table([path]).splitlines()[2:]
    often = "2,000 cases, 1,100 of them compared to the last bit; 9,030 runs; seed 5"
    assert row == f"| random layers, the whole contract | CPU | {often} | {result} |"
