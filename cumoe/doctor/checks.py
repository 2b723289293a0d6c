"""The checks, from the ground up: each returns findings, and none needs the one before it to have gone well."""

import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from cumoe.doctor.child import ask
from cumoe.doctor.finding import Finding, Verdict, one_line
from cumoe.doctor.nvidia import Driver, ask_driver
from cumoe.gpu.sources import kernels_directory

MIN_PYTHON = (3, 10)
MIN_NUMPY, MIN_CUPY, BAD_CUPY = (2, 1, 2), (14, 0, 1), "14.1.0"
MIN_COMPUTE_CAPABILITY = (8, 0)
HOPPER, HOPPER_NVRTC = (9, 0), (12, 9)
EXTRAS = ("safetensors", "tqdm", "matplotlib", "hypothesis", "torch", "jax")
COMPILER = (
    "pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12 (with cupy-cuda13x: pip install cupy-cuda13x[ctk])"
)
COLD_SECONDS = 900

CUPY_CODE = """
import cupy
answer['version'] = cupy.__version__
answer['available'] = bool(cupy.cuda.is_available())
try:
    answer['nvrtc'] = list(cupy.cuda.nvrtc.getVersion())
except Exception as error:
    answer['no_nvrtc'] = f'{type(error).__name__}: {error}'
"""

COMPILE_CODE = """
from cumoe.gpu.inventory import compile_one_unit
answer.update(compile_one_unit())
"""

HEADERS_CODE = """
from cumoe.gpu.inventory import header_version
answer['headers'] = header_version()
"""

IMPORT_CODE = """
import time
begin = time.perf_counter()
import cumoe
answer['seconds'] = time.perf_counter() - begin
"""

KERNELS_CODE = """
from cumoe.gpu.inventory import kernels
answer['kernels'] = kernels()
"""


class Examination:
    """What later checks know from earlier ones."""

    def __init__(self, *, gpu_is_wanted: bool, quick: bool) -> None:
        self.gpu_is_wanted, self.quick = gpu_is_wanted, quick
        self.driver: Driver | None = None
        self.cupy: dict[str, Any] = {"error": "not asked"}

    @property
    def has_gpu(self) -> bool:
        """Whether the driver shows one."""
        return self.driver is not None and bool(self.driver.gpus)

    @property
    def gpu_verdict(self) -> Verdict:
        """What a hole in the way to the GPU is: without a GPU that nobody asked for, something to know."""
        return "FAIL" if self.gpu_is_wanted or self.has_gpu else "note"

    @property
    def is_hopper(self) -> bool:
        """Whether the Hopper kernels are for one of the GPUs."""
        return self.driver is not None and any(gpu.compute_capability == HOPPER for gpu in self.driver.gpus)

    def checks(self) -> dict[str, Callable[[], Iterator[Finding]]]:
        """Return all checks by subject, in the order in which they run."""
        return {
            "Python": self.python,
            "driver": self.nvidia,
            "packages": self.packages,
            "CuPy": self.cupy_package,
            "compiler": self.compiler,
            "cache": self.cache,
            "sources": self.sources,
            "import": self.imports,
            "extras": self.extras,
        }

    def python(self) -> Iterator[Finding]:
        """Examine Python itself."""
        where = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
        is_new = sys.version_info[:2] >= MIN_PYTHON
        cure = "" if is_new else f"a Python of version {'.'.join(map(str, MIN_PYTHON))} or newer"
        yield Finding("ok" if is_new else "FAIL", "Python", where, cure)

    def packages(self) -> Iterator[Finding]:
        """Examine what nothing runs without."""
        for name, least in (("numpy", MIN_NUMPY), ("ml_dtypes", (0,))):
            wanted = f'pip install "{name}>={".".join(map(str, least))}"' if least > (0,) else f"pip install {name}"
            found = ask(f"import {name}\nanswer['version'] = {name}.__version__")
            if "error" in found:
                yield Finding("FAIL", name, f"cannot be imported: {one_line(found['error'])}", wanted)
            elif _numbers(found["version"]) < least:
                yield Finding("FAIL", name, f"{found['version']} is too old", wanted)
            else:
                yield Finding("ok", name, found["version"])

    def nvidia(self) -> Iterator[Finding]:
        """Examine the driver and its devices."""
        cure = "NumPy arrays run on the CPU without one; for a GPU install NVIDIA's driver (in a container: --gpus all)"
        try:
            self.driver = driver = ask_driver()
        except (OSError, AttributeError) as error:
            yield Finding(self.gpu_verdict, "driver", f"none: {one_line(error)}", cure)
            return
        release = f"{driver.release}, " if driver.release else ""
        yield Finding("ok", "driver", f"{release}for CUDA up to {_dotted(driver.cuda)}")
        if not driver.gpus:
            yield Finding(self.gpu_verdict, "GPU", driver.trouble or "none", cure)
        for gpu in driver.gpus:
            text = (
                f"{gpu.name}, compute capability {_dotted(gpu.compute_capability)}, {gpu.num_multiprocessors} SMs, "
                f"{gpu.memory_bytes / 2**30:.0f} GiB"
            )
            is_served = gpu.compute_capability >= MIN_COMPUTE_CAPABILITY
            cure = f"compute capability {_dotted(MIN_COMPUTE_CAPABILITY)} or newer; NumPy arrays run on the CPU"
            yield Finding("ok" if is_served else "FAIL", "GPU", text, "" if is_served else cure)

    def cupy_package(self) -> Iterator[Finding]:
        """Examine CuPy: one package, new enough, and importable."""
        packages = sorted({name.lower() for each in metadata.distributions() if (name := each.metadata["Name"] or "")})
        installed = [name for name in packages if name == "cupy" or name.startswith("cupy-cuda")]
        self.cupy = ask(CUPY_CODE)
        install = "pip install cupy-cuda12x"
        if len(installed) > 1:
            text = f"{' and '.join(installed)} are both there, and break each other"
            yield Finding(self.gpu_verdict, "CuPy", text, f"pip uninstall {' '.join(installed)}, then {install}")
        if not installed and "error" in self.cupy:
            yield Finding(self.gpu_verdict, "CuPy", "not installed; NumPy arrays run on the CPU", install)
            return
        name = installed[0] if len(installed) == 1 else "cupy"
        if "error" in self.cupy:
            cure = f"pip install --force-reinstall {name}"
            text = f"{name} cannot be imported: {one_line(self.cupy['error'])}"
            yield Finding(self.gpu_verdict, "CuPy", text, cure)
            return
        version = self.cupy["version"]
        if _numbers(version) < MIN_CUPY or version == BAD_CUPY:
            cure = f'pip install "{name}>={_dotted(MIN_CUPY)},!={BAD_CUPY}"'
            yield Finding(self.gpu_verdict, "CuPy", f"{version} is not supported", cure)
        elif self.has_gpu and not self.cupy["available"]:
            cure = "a CuPy package for the driver's CUDA version: cupy-cuda12x serves drivers for CUDA 12 and 13"
            yield Finding("FAIL", "CuPy", f"{version} ({name}) sees no device", cure)
        else:
            yield Finding("ok", "CuPy", f"{version} ({name})")

    def compiler(self) -> Iterator[Finding]:
        """Examine NVRTC and its headers; without a GPU, where nothing else will be compiled, compile one unit."""
        version = self.cupy.get("nvrtc")
        if version is None:
            missing = self.cupy.get("no_nvrtc", "CuPy, which looks for it, is not usable")
            yield Finding(self.gpu_verdict, "NVRTC", one_line(missing), COMPILER)
            return
        text = _dotted(version)
        if self.is_hopper and tuple(version) < HOPPER_NVRTC:
            cure = 'pip install -U "nvidia-cuda-nvrtc-cu12>=12.9" "nvidia-cuda-runtime-cu12>=12.9"'
            slow = f"{text}: the Hopper kernels need {_dotted(HOPPER_NVRTC)}; the portable ones serve"
            yield Finding("FAIL", "NVRTC", slow, cure)
        else:
            yield Finding("ok", "NVRTC", text)
        found = ask(HEADERS_CODE if self.has_gpu else COMPILE_CODE)
        if self.has_gpu and not found.get("headers"):
            text = "not found beside CuPy; the import below shows whether CuPy knows others"
            yield Finding("note", "headers", text, COMPILER)
        elif self.has_gpu:
            yield Finding("ok", "headers", f"CUDA {_dotted(found['headers'])}")
        elif "error" in found:
            text = f"a unit does not compile: {one_line(found['error'])}"
            yield Finding(self.gpu_verdict, "headers", text, COMPILER)
        else:
            headers = f"CUDA {_dotted(found['headers'])}; " if found.get("headers") else ""
            yield Finding("ok", "headers", f"{headers}{found['unit']}.cu compiled in {found['seconds']:.2f} s")

    def cache(self) -> Iterator[Finding]:
        """Examine the folder in which CuPy keeps compiled kernels."""
        folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            cure = "set CUPY_CACHE_DIR to a folder that can be written; else `import cupy` fails"
            yield Finding(self.gpu_verdict, "cache", f"{folder}: {error.strerror or error}", cure)
            return
        kept = [path.stat().st_size for path in folder.glob("*.cubin")]
        yield Finding("ok", "cache", f"{folder}: {len(kept)} kernels, {sum(kept) / 2**20:.1f} MiB")

    def sources(self) -> Iterator[Finding]:
        """Look for the CUDA sources of the package."""
        try:
            folder = kernels_directory()
        except FileNotFoundError as error:
            yield Finding("FAIL", "sources", one_line(error), "pip install --force-reinstall --no-deps cumoe")
            return
        yield Finding("ok", "sources", f"{len(list(folder.glob('*.cu*')))} CUDA files in {folder}")

    def imports(self) -> Iterator[Finding]:
        """Time `import cumoe` with nothing compiled yet and with everything; see what the compiled kernels need."""
        with tempfile.TemporaryDirectory() as folder:
            empty = {} if self.quick else _empty_caches(folder)
            first = ask(IMPORT_CODE, COLD_SECONDS, empty)
            if "error" in first:
                cure = "what the lines above say; then pip install --force-reinstall cumoe"
                yield Finding("FAIL", "import", f"import cumoe fails: {one_line(first['error'])}", cure)
                return
            again = ask(IMPORT_CODE + (KERNELS_CODE if self.has_gpu else ""), COLD_SECONDS, empty)
            cold = "" if self.quick else f"cold {first['seconds']:.2f} s (no bytecode, no kernels), "
            yield Finding("ok", "import", f"{cold}warm {again.get('seconds', float('nan')):.2f} s")
            if not self.has_gpu:
                yield Finding("ok", "kernels", "none: they are compiled where there is a GPU")
            elif "error" in again:
                yield Finding("FAIL", "kernels", one_line(again["error"]), "what the lines above say")
            else:
                yield from _kernels(again["kernels"])

    def extras(self) -> Iterator[Finding]:
        """List what is optional."""
        versions = {each.metadata["Name"]: each.version for each in metadata.distributions()}
        there = [f"{name} {versions[name]}" for name in EXTRAS if name in versions]
        missing = [name for name in EXTRAS if name not in versions]
        text = f"{', '.join(there) or 'none'}" + (f"; not installed: {', '.join(missing)}" if missing else "")
        yield Finding("ok", "extras", text)


def _empty_caches(folder: str) -> dict[str, str]:
    """Return variables with which nothing is compiled yet, neither kernels nor Python; a second run finds both."""
    python = {"PYTHONPYCACHEPREFIX": f"{folder}/python", "PYTHONDONTWRITEBYTECODE": ""}
    return {"CUPY_CACHE_DIR": f"{folder}/cupy"} | python


def _kernels(found: list[dict[str, Any]]) -> Iterator[Finding]:
    spilling = [kernel for kernel in found if kernel["local_bytes"]]
    verdict: Verdict = "note" if spilling else "ok"
    cure = "another NVRTC version: these kernels are slower than they should be" if spilling else ""
    names = f": {', '.join(kernel['name'] for kernel in spilling)}" if spilling else ""
    text = f"{len(found)} compiled, {len(spilling)} with local memory (spills){names}"
    yield Finding(verdict, "kernels", text, cure)
    for kernel in found:
        numbers = f"{kernel['registers']:>3} registers, {kernel['local_bytes']} bytes spilled"
        yield Finding("ok", "", f"{kernel['name']:<48} {numbers}, {kernel['shared_bytes']} bytes static shared")


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _dotted(version: Any) -> str:
    return ".".join(map(str, version))
