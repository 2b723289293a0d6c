"""Compile every kernel for every architecture with NVRTC; needs no GPU. Fails on an error, a spill or a stack frame.

Usage: python .ci/compile_kernels.py [sm_90a ...]
"""

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from cuda.pathfinder import find_nvidia_header_directory
from cupy.cuda import nvrtc

from cumoe.gpu import sources

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
LOUD = ("--ptxas-options=-v", "--ptxas-options=--warn-on-spills")
BAD = re.compile(r"[1-9]\d* bytes (?:stack frame|spill)|C75\d\d|spill(?:ed|ing) ", re.IGNORECASE)
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
USED = re.compile(r"Used (\d+) registers")


def compile_unit(unit: str, architecture: str) -> tuple[str, float]:
    """Return the log and the seconds of one translation unit."""
    begin = time.perf_counter()
    options = (f"-arch={architecture}", "-ftz=true", *sources.OPTIONS, *LOUD)
    headers = "-I" + str(find_nvidia_header_directory("cudart"))
    program = nvrtc.createProgram(sources.unit_source(unit), unit + ".cu", (), ())
    try:
        nvrtc.compileProgram(program, (*options, headers))
    except nvrtc.NVRTCError:
        return "error: " + nvrtc.getProgramLog(program), time.perf_counter() - begin
    finally:
        log = nvrtc.getProgramLog(program).rstrip("\0")
        nvrtc.destroyProgram(program)
    return log, time.perf_counter() - begin


def main(architectures: list[str]) -> int:
    """Print a line a kernel; return the number of bad units."""
    jobs = [(unit, arch) for arch in architectures for unit in sources.UNITS]
    jobs += [("ends", arch) for arch in architectures]  # compiled for the layers that need it, not at import
    failures = 0
    with ThreadPoolExecutor() as pool:
        for (unit, arch), (log, seconds) in zip(jobs, pool.map(lambda job: compile_unit(*job), jobs), strict=True):
            names, registers = ENTRY.findall(log), USED.findall(log)
            bad = log.startswith("error") or BAD.search(log) is not None or not names
            failures += bad
            kernels = ", ".join(f"{name} {count}" for (name, _), count in zip(names, registers, strict=False))
            print(f"{'FAIL' if bad else 'ok':4}  {arch:7} {unit:24} {seconds:5.1f} s  {kernels}")
            if bad:
                print(log)
    print(f"{len(jobs) - failures} passed, {failures} failed")
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(ARCHITECTURES)) > 0)
