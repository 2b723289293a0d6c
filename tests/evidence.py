"""What was tried, how often, with what result, as a table: ``python tests/evidence.py RECORD ...``.

A record is a junit file of pytest (``cpu.xml``, ``gpu.xml``) or the counts of ``tests/fuzz --record``. The files of a
tool of compute-sanitizer, ``memcheck-2of3.xml`` and ``.log`` for the second of three parts, make one row together; what
the tool had no time for and the tests that took longest come behind the table. Skipped tests do not count.
"""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SUBJECTS = {
    "layers, stages and options against float64": (
        "test_moe test_layer test_layer_router test_route test_group test_grouped_gemm test_combine test_activation "
        "test_frame"
    ),
    "layers against the modules of transformers": "test_cases test_checkpoint test_checkpoint_families",
    "every tile that dispatch can choose": (
        "test_tiles test_few_slots test_turns test_tensor_map test_dispatch test_dispatch_sweep"
    ),
    "failures of other projects": "test_known_bugs",
    "limits of sizes and arrays": "test_limits test_large",
    "refusals": "test_refusals test_refusals_owners test_checkpoint_broken",
    "faults: memory, compiler, driver, cache, processes": (
        "test_faults_memory test_faults_processes test_faults_compiler"
    ),
    "hand-over: torch, JAX, maps of files, interfaces": (
        "test_interop test_handover_gpu test_dlpack_export test_dlpack_import test_dlpack_libraries"
    ),
    "the CUDA sources on the CPU, AddressSanitizer and UBSan": "test_cuda_on_cpu",
}
OTHERS = "command line, packaging, README, the contract's own tests"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PART = re.compile(rf"({'|'.join(TOOLS)})(?:-\d+of(\d+))?")
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
SLOWEST = 10


def subject_of(file: str) -> str:
    """Return the subject of a test file, named without its suffix."""
    return next((subject for subject, files in SUBJECTS.items() if file in files.split()), OTHERS)


def counted(path: Path) -> tuple[Counter[str], Counter[str]]:
    """Return how many tests of each subject ran, and how many of them failed."""
    ran, failed = Counter[str](), Counter[str]()
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        subject = subject_of(case.get("classname", "").rpartition(".")[2])
        ran[subject] += 1
        failed[subject] += case.find("failure") is not None or case.find("error") is not None
    return ran, failed


def rows_of(path: Path) -> list[tuple[str, str, str, str]]:
    """Return (what was tried, where, how often, with what result) of a record that no tool wrote."""
    if path.suffix == ".json":
        record = json.loads(path.read_text(encoding="utf-8"))
        count = record["counts"]
        same = sum(number for what, number in count.items() if "same bits" in what)
        often = (
            f"{count['cases']:,} cases, {count['exact']:,} of them compared to the last bit; {same:,} runs; "
            f"seed {record['seed']}"
        )
        return [("random layers, the whole contract", record["where"], often, verdict(record["breaches"]))]
    ran, failed = counted(path)
    order = [*SUBJECTS, OTHERS]
    return [
        (subject, path.stem.upper(), f"{ran[subject]:,} tests", verdict(failed[subject], "fail"))
        for subject in sorted(ran, key=order.index)
    ]


@dataclass
class Sanitized:
    """The parts of a run under one tool."""

    tool: str
    logs: list[Path]
    junits: list[Path]

    @cached_property
    def cases(self) -> list[ElementTree.Element]:
        """The tests of all parts."""
        return [case for path in self.junits for case in ElementTree.parse(path).iter("testcase")]

    @cached_property
    def ran(self) -> list[ElementTree.Element]:
        """Those that were not skipped."""
        return [case for case in self.cases if case.find("skipped") is None]

    @property
    def num_parts(self) -> int:
        """How many there have to be, whether or not they left a record."""
        named = [PART.fullmatch(path.stem) for path in (*self.logs, *self.junits)]
        return max(1, *(int(match[2]) for match in named if match and match[2]), len(self.logs))

    @property
    def chosen(self) -> int:
        """How many tests all parts had to run; each record says so."""
        said = [
            int(each.get("value", "0"))
            for path in self.junits
            for each in ElementTree.parse(path).iter("property")
            if each.get("name") == "chosen"
        ]
        return max([len(self.cases), *said])

    def skipped(self, words: str) -> int:
        """Return how many were skipped with a reason that begins with those words."""
        return sum(reason_of(case).startswith(words) for case in self.cases)

    def row(self) -> tuple[str, str, str, str]:
        """Return the row of the tool."""
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in self.logs]
        summaries = [found for text in texts if (found := SUMMARY.findall(text))]
        errors = sum(int(one or other) for found in summaries for one, other in found)
        failed = sum(case.find("failure") is not None or case.find("error") is not None for case in self.ran)
        results = [verdict(errors, "errors")] if summaries else []
        results += [verdict(failed, "fail")] if failed else []
        missing = self.num_parts - len(summaries)
        results += [f"**no summary in {missing} of {self.num_parts} logs**"] if missing else []
        often = f"{len(self.ran):,} of {self.chosen:,} tests at small shapes"
        return f"compute-sanitizer {self.tool}", "GPU", often, ", ".join(results)

    def details(self) -> list[str]:
        """Return what it had no time for, and the tests that took longest, in seconds."""
        counts = {"had no time left": self.skipped("time is up"), "were cut off": self.skipped("cut off")}
        counts["were skipped for other reasons"] = len(self.cases) - len(self.ran) - sum(counts.values())
        counts["left no record"] = self.chosen - len(self.cases)
        others = "".join(f", {number:,} {what}" for what, number in counts.items() if number)
        ran = f"{len(self.ran):,} of {self.chosen:,} tests ran"
        lines = [f"{self.tool}, {self.num_parts} parts: {ran}{others}; longest, in seconds:"]
        for case in sorted(self.cases, key=seconds_of, reverse=True)[:SLOWEST]:
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            lines.append(f"{seconds_of(case):8.1f}  {name}  {reason_of(case)}".rstrip())
        return lines


def seconds_of(case: ElementTree.Element) -> float:
    """Return how long a test took, with its fixtures."""
    return float(case.get("time", "0"))


def reason_of(case: ElementTree.Element) -> str:
    """Return why a test was skipped; an empty word where it ran."""
    skipped = case.find("skipped")
    return "" if skipped is None else skipped.get("message", "no reason")


def sanitized(records: list[Path]) -> list[Sanitized]:
    """Return what ran under a tool, in the order of `TOOLS`."""
    found = {tool: Sanitized(tool, [], []) for tool in TOOLS}
    for path in records:
        match = PART.fullmatch(path.stem)
        if match:
            (found[match[1]].logs if path.suffix == ".log" else found[match[1]].junits).append(path)
    return [each for each in found.values() if each.logs or each.junits]


def verdict(number: int, what: str = "do not hold") -> str:
    """Return a result in words."""
    return f"**{number:,} {what}**" if number else "0 errors" if what == "errors" else "all hold"


def table(records: list[Path]) -> str:
    """Return the table of all records."""
    rows = [row for path in records if not PART.fullmatch(path.stem) for row in rows_of(path)]
    rows += [each.row() for each in sanitized(records)]
    lines = ["| what was tried | on | how often | result |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


if __name__ == "__main__":
    given = [Path(name) for name in sys.argv[1:] if Path(name).is_file()]
    print(table(given))
    for each in sanitized(given):
        print("", *each.details(), sep="\n")
