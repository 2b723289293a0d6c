"""What the compiled kernels are and need: for reports."""

import re
import time
from functools import cache
from typing import Any

from cumoe.door.arrays import cupy
from cumoe.gpu import compile as compiling
from cumoe.gpu.sources import OPTIONS, UNITS, WGMMA_UNITS, unit_source

TRIAL_UNIT, TRIAL_ARCHITECTURE = "gate", "sm_80"
"""The smallest unit; it includes both headers of CUDA that any unit includes."""

_MACRO = re.compile(r"#define (\w+)\(([^)]*)\)((?:[^\n]*\\\n)*[^\n]*)")
_CALL = re.compile(r"^\s*([A-Z_]+)\(([^()]*)\)\s*\\?$", re.MULTILINE)


@cache
def kernel_names(unit: str) -> tuple[str, ...]:
    """Return the names of the kernels of a unit, read from its text: macros that define kernels are called by line."""
    if unit in WGMMA_UNITS:
        return (unit,)
    text = unit_source(unit)
    macros = {name: (_words(parameters), body) for name, parameters, body in _MACRO.findall(text)}

    def expand(name: str, arguments: list[str]) -> list[str]:
        parameters, body = macros[name]
        values = dict(zip(parameters, arguments, strict=True))
        found = re.findall(r"__global__ void __launch_bounds__\(.*?\)\s*\\?\s*([A-Z]+)\(", body, re.DOTALL)
        names = [values[parameter] for parameter in found]
        for inner, given in _CALL.findall(body):
            if inner in macros:
                names += expand(inner, [_substitute(word, values) for word in _words(given)])
        return names

    outside = _MACRO.sub("", text)
    calls = [(name, _words(given)) for name, given in _CALL.findall(outside) if name in macros]
    return tuple(kernel for name, given in calls for kernel in expand(name, given))


def kernels() -> list[dict[str, Any]]:
    """Return a dict a compiled kernel: name, registers, local_bytes (spills), shared_bytes (static).

    Raises
    ------
    RuntimeError
        If the kernels could not be compiled on this machine; the text says why.
    """
    units = UNITS + (tuple(WGMMA_UNITS) if compiling.has_wgmma(cupy.cuda.Device().id) else ())
    found = []
    for name in (name for unit in units for name in kernel_names(unit)):
        kernel = compiling.kernel(name)
        attributes = {
            "registers": kernel.num_regs,
            "local_bytes": kernel.local_size_bytes,
            "shared_bytes": kernel.shared_size_bytes,
        }
        found.append({"name": name} | {word: int(value) for word, value in attributes.items()})
    return found


def compile_one_unit() -> dict[str, Any]:
    """Compile the smallest unit with NVRTC, which needs no GPU; return unit, seconds and the version of the headers.

    Raises
    ------
    RuntimeError
        If it does not compile, with what the compiler says, or if CuPy is not there.
    """
    if cupy is None:
        raise RuntimeError("CuPy is not usable")
    nvrtc, folder = cupy.cuda.nvrtc, _header_folder()
    program = nvrtc.createProgram(unit_source(TRIAL_UNIT), f"{TRIAL_UNIT}.cu", (), ())
    begin = time.perf_counter()
    try:
        include = (f"-I{folder}",) if folder else ()
        nvrtc.compileProgram(program, (f"-arch={TRIAL_ARCHITECTURE}", *OPTIONS, *include))
    except nvrtc.NVRTCError:
        raise RuntimeError(nvrtc.getProgramLog(program)) from None
    finally:
        nvrtc.destroyProgram(program)
    seconds = time.perf_counter() - begin
    return {"unit": TRIAL_UNIT, "seconds": seconds, "headers": header_version()}


def _header_folder() -> str | None:
    from cuda.pathfinder import find_nvidia_header_directory  # noqa: PLC0415 - comes with CuPy, which may be missing

    found: str | None = find_nvidia_header_directory("cudart")
    return found


def header_version() -> tuple[int, int] | None:
    """Return the CUDA version that the headers are of, or None where none are found."""
    folder = _header_folder()
    if folder is None:
        return None
    with open(f"{folder}/cuda_runtime_api.h", encoding="utf-8") as file:  # noqa: PTH123 - read by line
        for line in file:
            if match := re.match(r"#define CUDART_VERSION\s+(\d+)", line):
                number = int(match[1])
                return number // 1000, number % 1000 // 10
    return None


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _substitute(word: str, values: dict[str, str]) -> str:
    """Replace a macro's parameters, alone or pasted with ##."""
    return "".join(values.get(part, part) for part in re.split(r"##", word))
