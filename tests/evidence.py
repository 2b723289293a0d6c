"""What was tried, how often, with what result, as a table: ``python tests/evidence.py RECORD ...``.

A record is a junit file of pytest (``cpu.xml``, ``gpu.xml``; ``memcheck.xml`` and so on belong to a log of
compute-sanitizer), the counts of ``tests/fuzz --record``, or such a log. Skipped tests do not count.
"""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

SUBJECTS = {
    "layers, stages and options against float64": (
        "test_moe test_layer test_layer_router test_route test_group test_grouped_gemm test_combine test_activation "
        "test_frame"
    ),
    "layers against the modules of transformers": "test_cases test_checkpoint test_checkpoint_families",
    "every tile that dispatch can choose": "test_tiles test_dispatch test_dispatch_sweep",
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
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


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


def rows_of(path: Path, records: list[Path]) -> list[tuple[str, str, str, str]]:
    """Return (what was tried, where, how often, with what result) of a record."""
    if path.suffix == ".json":
        record = json.loads(path.read_text(encoding="utf-8"))
        count = record["counts"]
        same = sum(number for what, number in count.items() if "same bits" in what)
        often = (
            f"{count['cases']:,} cases, {count['exact']:,} of them compared to the last bit; {same:,} runs; "
            f"seed {record['seed']}"
        )
        return [("random layers, the whole contract", record["where"], often, verdict(record["breaches"]))]
    if path.suffix == ".log":
        found = SUMMARY.findall(path.read_text(encoding="utf-8", errors="replace"))
        errors = sum(int(one or other) for one, other in found)
        ran = sum((counted(xml)[0] for xml in records if xml.name == f"{path.stem}.xml"), Counter())
        result = verdict(errors, "errors") if found else "no summary in the log"
        return [(f"compute-sanitizer {path.stem}", "GPU", f"{ran.total():,} tests at small shapes", result)]
    if path.stem in TOOLS:
        return []
    ran, failed = counted(path)
    order = [*SUBJECTS, OTHERS]
    return [
        (subject, path.stem.upper(), f"{ran[subject]:,} tests", verdict(failed[subject], "fail"))
        for subject in sorted(ran, key=order.index)
    ]


def verdict(number: int, what: str = "do not hold") -> str:
    """Return a result in words."""
    return f"**{number:,} {what}**" if number else "0 errors" if what == "errors" else "all hold"


def table(records: list[Path]) -> str:
    """Return the table of all records."""
    lines = ["| what was tried | on | how often | result |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for path in records for row in rows_of(path, records)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([Path(name) for name in sys.argv[1:] if Path(name).is_file()]))
