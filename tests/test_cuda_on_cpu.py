"""The CUDA sources compiled for the CPU under AddressSanitizer and UBSan; the package's own GPU tests run on them.

What this proves and what it does not is said in cuda_on_cpu/__init__.py. Every suite is a pytest of its own in a
process with the sanitizers, whose `cupy` is cuda_on_cpu/fake_cupy.py; several run side by side.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_on_cpu import build

from cumoe.gpu.sources import kernels_directory

TESTS = Path(__file__).resolve().parent
SUITES = {
    "test_moe.py": 30,
    "test_known_bugs.py": 125,
    "test_limits.py": 90,
    "test_fuzz.py": 1,
    "test_faults_memory.py": 9,
    "cuda_on_cpu/portable_tiles.py": 155,
    "cuda_on_cpu/portable_stages.py": 140,
    "test_grouped_gemm.py": 38,
    "test_route.py": 120,
    "test_layer_router.py": 80,
    "test_route_and_count.py": 85,
    "test_layer.py": 25,
    "test_replay.py": 20,
    "test_group.py": 60,
    "test_frame.py": 60,
    "test_combine.py": 50,
    "test_capture.py": 15,
    "test_plan.py": 17,
    "test_activation.py": 70,
}
"""The files whose GPU half runs here, the slowest first, and how many tests that is at least."""

NOT_HERE = " and ".join(
    f"not {words}"
    for words in (
        # Pools are CuPy's, not the kernels'; threads take turns here, and one dtype shows what there is to see of pools
        # and graphs.
        *(
            "threads_share",
            "(graph_replays and float16)",
            "(allocate_nothing and float16)",
            "graph_uses",
            "in_a_graph_uses",
            "pool_with",
        ),
        # Here every run is the same; and more of the same is long.
        *("every_time", "many_tokens", "(normal_numbers and 400)", "test_sizes", "two_bytes_count", "not_square"),
        *("bias_was_in_the_weights",),
        # Arrays that only CuPy makes.
        *("misaligned_cupy", "one_matrix"),
    )
)

TWO_DTYPES = {"test_moe.py", "test_layer.py", "test_replay.py", "test_capture.py"}
"""Suites that leave bfloat16 out: on the CPU it is float16 with another conversion, and portable_tiles.py has both."""

TIMEOUT_S = 240


class Run(NamedTuple):
    """What came out of a process with the sanitizers."""

    status: int
    output: str

    @property
    def launches(self) -> dict[str, int]:
        """Launches a kernel."""
        found = re.search(r"^kernels launched: (.*)$", self.output, re.MULTILINE)
        return {} if found is None else json.loads(found[1])


def sanitized(library, *arguments):
    """Run Python under the sanitizers, with the library that it shall use."""
    libraries = [
        subprocess.run([build.compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libstdc++.so")  # the first looks for what throws in the second, when it starts
    ]
    changed = {
        "LD_PRELOAD": ":".join(found.stdout.strip() for found in libraries),
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=64",  # an interpreter that ends leaves memory behind
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
        "PYTEST_ADDOPTS": "",
        "OPENBLAS_NUM_THREADS": "1",
        "CUMOE_CUDA_ON_CPU": str(library),
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=os.environ | changed, cwd=TESTS.parent, capture_output=True,
        text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    return Run(done.returncode, done.stdout + done.stderr)


def run_suite(library, suite, *arguments):
    """Run the GPU half of a test file."""
    options = ("-q", "-p", "no:cacheprovider", "-p", "cuda_on_cpu.plugin", "--capture=sys", "-m", "gpu")
    return sanitized(library, "-m", "pytest", *options, TESTS / suite, *arguments)


@pytest.fixture(scope="session", autouse=True)
def compiler():
    """Skip where there is no g++, unless CUMOE_TESTS_NEED_GXX says that there has to be one."""
    if build.compiler() is None:
        (pytest.fail if os.environ.get("CUMOE_TESTS_NEED_GXX") else pytest.skip)("no g++ to compile the kernels with")


@pytest.fixture(scope="session")
def library(compiler, tmp_path_factory):
    """Return all portable kernels as a library for the CPU."""
    return build.build(kernels_directory(), tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(scope="session")
def runs(request, library):
    """Return the runs of the suites that this session asks for, as futures; two at a time."""
    asked = {item.callspec.params["suite"] for item in request.session.items if "suite" in params_of(item)}
    if any(item.name == test_every_kernel_was_launched.__name__ for item in request.session.items):
        asked = set(SUITES)
    with ThreadPoolExecutor(2) as pool:
        few = {suite: f"{NOT_HERE} and not bfloat16" if suite in TWO_DTYPES else NOT_HERE for suite in SUITES}
        futures = {
            suite: pool.submit(run_suite, library, suite, "-k", few[suite]) for suite in SUITES if suite in asked
        }
        yield futures
        pool.shutdown(cancel_futures=True)


def params_of(item):
    """Return the parameters of a test of this file."""
    return item.callspec.params if item.path == Path(__file__).resolve() and hasattr(item, "callspec") else {}


@pytest.mark.parametrize("suite", SUITES)
def test_gpu_tests_pass_on_the_cpu(runs: dict[str, Future], suite):
    """The same properties, on the same launch code, with every index checked and every array poisoned."""
    run = runs[suite].result()
    assert run.status == 0, run.output
    passed = re.search(r"(\d+) passed", run.output)
    assert passed is not None and int(passed[1]) >= SUITES[suite], run.output
    assert "skipped" not in run.output
    assert sum(run.launches.values()) > int(passed[1]) // 2


def test_every_kernel_was_launched(runs: dict[str, Future], library):
    """No kernel of a portable unit is left out."""
    sources = library.parent / "kernels"
    there = {kernel["name"] for unit in build.UNITS for kernel in build.kernels_of(unit, sources)}
    launched = set().union(*(run.result().launches for run in runs.values()))
    assert len(there) > 30
    assert there - launched == set()


# That the check can fail: kernels that are wrong on purpose, and the package's own with one line changed.

FAULTS = {
    "fault_global_overrun": (1, "heap-buffer-overflow"),
    "fault_global_underrun": (1, "heap-buffer-overflow"),
    "fault_dynamic_shared_overrun": (1, "heap-buffer-overflow"),
    "fault_static_shared_overrun": (1, "heap-buffer-overflow"),
    "fault_misaligned": (1, "misaligned address"),
    "fault_integer_overflow": (1, "signed integer overflow"),
    "fault_diverging_barriers": (0, r"divergence: comes to __syncthreads at faults.cu:\d+ while others wait"),
    "fault_barrier_and_warp": (0, r"deadlock\n.*threads 0-4, 6-31 wait at __syncwarp, faults.cu:\d+"),
    "fault_lane_that_left": (0, r"deadlock\n.*threads 0-6, 8-38, 40-63 wait at __shfl_xor_sync"),
    "fault_foreign_mask": (0, "divergence: .* does not name its own lane"),
    "fault_missing_barrier": (0, "wrong numbers"),
    "fault_copy_not_awaited": (0, "wrong numbers"),
}
"""By kernel: the offset that it is launched with, and what is reported."""

LAUNCH_FAULT = """
import sys
import numpy as np
from cuda_on_cpu import fake_cupy
from cumoe.gpu.structs import Struct

name, offset = sys.argv[1], int(sys.argv[2])
ints = fake_cupy.asarray(np.arange(63, -1, -1, dtype=np.int32))
launch = Struct(pointer=("ints",), int64=("offset", "zero"))(ints=ints, offset=offset, zero=0)
fake_cupy.Kernel(name).launch(1, 64, launch.data, 256)
print("right numbers" if (fake_cupy.asnumpy(ints) == np.arange(63, -1, -1)).all() else "wrong numbers")
"""


@pytest.fixture(scope="session")
def faults(compiler, tmp_path_factory):
    """Return the library of the wrong kernels."""
    folder = tmp_path_factory.mktemp("faults")
    sources = folder / "sources"
    sources.mkdir()
    for path in [*kernels_directory().glob("*.cuh"), Path(build.__file__).with_name("faults.cu")]:
        (sources / path.name).write_text(path.read_text())
    return build.build(sources, folder, ("faults",), "-O0")


@pytest.mark.parametrize("kernel", FAULTS)
def test_a_fault_is_reported(faults, kernel):
    """Bounds, alignment, overflow, barriers, lanes, copies in flight."""
    offset, report = FAULTS[kernel]
    run = sanitized(faults, "-c", LAUNCH_FAULT, kernel, offset)
    assert re.search(report, run.output), run.output
    assert "right numbers" not in run.output


def test_what_is_no_fault_is_not_reported(faults):
    """The same harness, a right kernel; and the driver's refusals."""
    run = sanitized(faults, "-c", LAUNCH_FAULT, "fault_none", 0)
    assert (run.status, run.output) == (0, "right numbers\n")
    too_many = LAUNCH_FAULT.replace("launch(1, 64,", "launch(1, 96,")
    assert "threads a block, at most: expected 64, got 96" in sanitized(faults, "-c", too_many, "fault_none", 0).output
    other_struct = LAUNCH_FAULT.replace('"offset", "zero"', '"offset",').replace(", zero=0", "")
    refused = sanitized(faults, "-c", other_struct, "fault_none", 0).output
    assert "bytes of the argument: expected 24, got 16" in refused


class Mutant(NamedTuple):
    """A kernel with a line changed, and the tests that have to see it."""

    file: str
    old: str
    new: str
    units: tuple[str, ...]
    suite: str
    tests: str


ONE_LAYER = ("group", "combine", "gate")  # what a whole layer needs besides its grouped GEMM
TILES = "cuda_on_cpu/portable_tiles.py"
MUTANTS = {
    "scan_without_barrier": Mutant(
        "scan.cuh", "__syncthreads();  // the totals", "// the totals",
        ("group",), "test_group.py", "many_slots and 5000",
    ),
    "equals_move_the_row_too_early": Mutant(
        "group.cuh", "__syncwarp();  // every equal", "// every equal",
        ("group",), "test_group.py", "many_slots and 5000",
    ),
    "ties_go_unseen": Mutant(
        "route_lanes.cuh", "odd || steps != p.top_k * STEP ||", "odd ||",
        ("group", "route_and_group", "route_and_count"), "test_route_and_count.py", "odd_tokens and twins and 128",
    ),
    "counts_published_too_early": Mutant(
        "group.cuh", "__syncthreads();  // the histogram is complete", "// the histogram is complete",
        ("group", "route_and_group", "route_and_count"), "test_route_and_count.py", "every_corner and 12-3",
    ),
    "one_row_too_many": Mutant(
        "grouped_gemm_simt.cu", "row < tile.row_end ? a + ", "row <= tile.row_end ? a + ",
        (*ONE_LAYER, "grouped_gemm_simt"), TILES, "ragged_rows and simt",
    ),
    "one_feature_too_many": Mutant(
        "grouped_gemm_mma.cuh", "if (feature >= features(stack)) continue;", "if (feature > features(stack)) continue;",
        (*ONE_LAYER, "grouped_gemm_bfloat16"), TILES, "ragged_rows and mma_16-bf",
    ),
    "copies_read_in_flight": Mutant(
        "grouped_gemm_mma.cuh", "copy_async_wait<STAGES - 2>();", "copy_async_wait<STAGES - 1>();",
        (*ONE_LAYER, "grouped_gemm_bfloat16"), TILES, "inner_tails and mma_64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_changed_line_is_seen(tmp_path, mutant):
    """A barrier less, a row or a feature more, a copy read in flight: the suites above would fail."""
    changed = MUTANTS[mutant]
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in kernels_directory().glob("*.cu*"):
        text = path.read_text()
        if path.name == changed.file:
            assert text.count(changed.old) == 1, f"{changed.file} has changed: name another line"
            text = text.replace(changed.old, changed.new)
        (sources / path.name).write_text(text)
    run = run_suite(build.build(sources, tmp_path, changed.units, "-O0"), changed.suite, "-x", "-k", changed.tests)
    assert run.status == 1 or "AddressSanitizer" in run.output, run.output
    assert "AttributeError" not in run.output  # no kernel was missing
    assert re.search("AssertionError|AddressSanitizer|Mismatched elements|runtime error", run.output), run.output
