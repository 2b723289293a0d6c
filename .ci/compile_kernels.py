"""Compile every kernel for every architecture with NVRTC; needs no GPU.

Fails on an error, a spill, a stack frame, a warning that wgmma was serialised (C7510 and its neighbours), and on a
tensor core kernel whose machine code has no tensor core instruction: that shows in the disassembly alone.

Usage: python .ci/compile_kernels.py [sm_90a ...]
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda.pathfinder import find_nvidia_header_directory
from cupy.cuda import nvrtc

from cumoe.gpu import sources

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
LOUD = ("--ptxas-options=-v", "--ptxas-options=--warn-on-spills")
BAD = re.compile(r"[1-9]\d* bytes (?:stack frame|spill)|C75\d\d|spill(?:ed|ing) ", re.IGNORECASE)
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
USED = re.compile(r"Used (\d+) registers")
TENSOR_CORES = {"grouped_gemm_wgmma": "HGMMA"}
TENSOR_CORES |= dict.fromkeys(("grouped_gemm_bfloat16", "grouped_gemm_float16", "router_gemm"), "HMMA")
"""The beginning of a unit's name, and the instruction that every kernel of it lives on."""
SECTION = re.compile(r"^\s*\.section\s+\.text\.(\w+)", re.MULTILINE)


def disassembler() -> Path:
    """Return the path of nvdisasm, which comes with the extra `dev`."""
    files = importlib.metadata.files("nvidia-cuda-nvdisasm") or ()
    return next(Path(str(file.locate())) for file in files if file.stem == "nvdisasm")


def without_tensor_cores(unit: str, cubin: bytes) -> list[str]:
    """Return the kernels whose machine code lacks the instruction that their unit has to have."""
    wanted = next((word for prefix, word in TENSOR_CORES.items() if unit.startswith(prefix)), None)
    if wanted is None:
        return []
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin + b"\0")  # CuPy takes the last byte for the end of a text
        file.flush()
        done = subprocess.run([disassembler(), file.name], capture_output=True, text=True, check=True)
    _, *kernels = SECTION.split(done.stdout)  # name, code, name, code ...
    found = dict(zip(kernels[::2], kernels[1::2], strict=True))
    return [f"no {wanted} in {name}" for name, code in found.items() if wanted not in code] if found else ["no kernel"]


def compile_unit(unit: str, architecture: str) -> tuple[str, float]:
    """Return the log and the seconds of one translation unit; what is wrong with its code is part of the log."""
    begin = time.perf_counter()
    options = (f"-arch={architecture}", "-ftz=true", *sources.OPTIONS, *LOUD)
    headers = "-I" + str(find_nvidia_header_directory("cudart"))
    program = nvrtc.createProgram(sources.unit_source(unit), unit + ".cu", (), ())
    try:
        nvrtc.compileProgram(program, (*options, headers))
        missing = without_tensor_cores(unit, nvrtc.getCUBIN(program))
        wrong = f"error: {', '.join(missing)}\n" if missing else ""
        return wrong + nvrtc.getProgramLog(program).rstrip("\0"), time.perf_counter() - begin
    except nvrtc.NVRTCError:
        return "error: " + nvrtc.getProgramLog(program), time.perf_counter() - begin
    finally:
        nvrtc.destroyProgram(program)


def main(architectures: list[str]) -> int:
    """Print a line a kernel; return the number of bad units."""
    jobs = [(unit, arch) for arch in architectures for unit in sources.UNITS]
    jobs += [(unit, arch) for arch in architectures for unit in sources.WGMMA_UNITS if arch == "sm_90a"]
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
