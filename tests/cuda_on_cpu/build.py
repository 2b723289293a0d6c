"""Compiling CUDA sources into a library for the CPU, one object a translation unit."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
UNITS = (
    "grouped_gemm_bfloat16",
    "grouped_gemm_float16",
    "grouped_gemm_simt",
    "group",
    "route",
    "route_and_group",
    "route_and_count",
    "router_gemm",
    "combine",
    "ends",
    "gate",
)
"""All that is not for Hopper alone; the slowest to compile comes first."""

FLAGS = (
    *("-std=c++17", "-g", "-fPIC", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)

_SHARED = re.compile(
    r"(?P<extern>extern )?__shared__ (?:__align__\((?P<align>\w+)\) )?"
    r"(?P<type>[\w: ]+?) (?P<name>\w+)(?P<array>\[[^\]]*\])?;"
)
_KERNEL = re.compile(
    r"__global__ void __launch_bounds__\((?P<bounds>[^()]*)\)\s+"
    r"(?P<name>\w+)\(\s*const __grid_constant__ (?P<argument>[\w:]+) \w+\)"
)


def compiler() -> str | None:
    """Return the path of g++, or None."""
    return shutil.which("g++")


def build(kernels: Path, folder: Path, units: tuple[str, ...] = UNITS, level: str = "-O1") -> Path:
    """Compile the units that lie in the folder `kernels`; return the library, which is made in `folder`.

    `level` is the compiler's optimisation: the higher, the longer it takes and the shorter the tests.

    Raises
    ------
    RuntimeError
        With what the compiler says.
    """
    sources = folder / "kernels"
    sources.mkdir(parents=True)
    for path in kernels.glob("*.cu*"):
        (sources / path.name).write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copy(HERE / "ptx.cuh", sources)
    with ThreadPoolExecutor(2) as pool:
        runtime = pool.submit(_compile, HERE / "block.cpp", folder / "block.o", level)
        objects = list(pool.map(lambda unit: _compile_unit(unit, sources, folder, level), units))
    library = folder / "libcuda_on_cpu.so"
    _run("-shared", *FLAGS, "-o", library, *objects, runtime.result())
    return library


def rewritten(source: str) -> str:
    """Return CUDA C++ whose shared variables are references that each block binds anew; lines stay where they are."""

    def declare(match: re.Match[str]) -> str:
        kind, name = match["type"], match["name"]
        if match["extern"]:
            return f"{kind}* {name} = reinterpret_cast<{kind}*>(cuda_on_cpu::dynamic_shared());"
        storage = f"static cuda_on_cpu::StaticShared<{kind}{match['array'] or ''}> {name}_storage;"
        return f"{storage} auto& {name} = {name}_storage.of_block();"

    text = _SHARED.sub(declare, source)
    assert "__shared__" not in re.sub(r"//.*|/\*.*?\*/", "", text), "a shared variable that is declared in another way"
    return text


def kernels_of(unit: str, sources: Path) -> list[re.Match[str]]:
    """Return name, argument type and launch bounds of every kernel of a rewritten unit."""
    flags = ("-E", "-P", "-std=c++17", "-DCUDA_ON_CPU_LIST", "-x", "c++")
    text = _run(*flags, *_prelude(sources), sources / f"{unit}.cu")
    return list(_KERNEL.finditer(text))


def _compile_unit(unit: str, sources: Path, folder: Path, level: str) -> Path:
    kernels = kernels_of(unit, sources)
    assert kernels, f"{unit} has no kernel"
    launches = [f"CUDA_ON_CPU_KERNEL({k['name']}, {k['argument']}, {k['bounds']})\n" for k in kernels]
    source = folder / f"{unit}.cpp"
    source.write_text(f'#include "{unit}.cu"\n' + "".join(launches), encoding="utf-8")
    return _compile(source, folder / f"{unit}.o", level, *_prelude(sources))


def _prelude(sources: Path) -> tuple[str | Path, ...]:
    return ("-I", sources, "-I", HERE, "-include", HERE / "cuda_on_cpu.h")


def _compile(source: Path, target: Path, *options: str | Path) -> Path:
    _run(*FLAGS, *options, "-c", source, "-o", target)
    return target


def _run(*arguments: str | Path) -> str:
    command = [compiler() or "g++", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
