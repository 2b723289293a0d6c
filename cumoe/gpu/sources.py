"""The CUDA sources: where they lie, how a translation unit is joined, and which kernels it holds."""

import re
from functools import cache
from pathlib import Path

OPTIONS = ("--std=c++17",)

UNITS = (
    "gate",
    "ends",
    "router_gemm",
    "route",
    "route_and_group",
    "route_and_count",
    "group",
    "grouped_gemm_bfloat16",
    "grouped_gemm_float16",
    "grouped_gemm_simt",
    "combine",
)
"""Translation units for every GPU; the quickest to compile comes first."""

WGMMA_TYPES = {"bfloat16": "bf16", "float16": "fp16"}
WGMMA_ORDERS = ("inner_major", "row_major")
WGMMA_SHAPES = ("16x64", "32x64", "64x128", "144x256", "192x256", "2x144x256", "2x192x256")
WGMMA_UNITS = {
    f"grouped_gemm_wgmma_{dtype}_{order}_{shape}": (dtype, order, shape)
    for shape in reversed(WGMMA_SHAPES)
    for dtype in WGMMA_TYPES
    for order in WGMMA_ORDERS
}
"""Translation units for Hopper alone, the slowest to compile first: one source, compiled once for each of them."""

WGMMA_OPTIONS = ("-arch=sm_90a", *OPTIONS)
"""The letter a admits wgmma and setmaxnreg. CuPy adds an -arch of its own; NVRTC keeps the letter from 12.9 on."""

_PACKAGE = Path(__file__).resolve().parent.parent
_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)


@cache
def kernels_directory() -> Path:
    """Return the folder of the sources: inside an installed package, beside it in a checkout."""
    candidates = (_PACKAGE / "kernels", _PACKAGE.parent / "kernels")
    for folder in candidates:
        if (folder / "types.cuh").is_file():
            return folder
    raise FileNotFoundError(f"cumoe: no CUDA sources in {' or '.join(map(str, candidates))}; reinstall the package")


@cache
def unit_source(unit: str) -> str:
    """Return one translation unit with the project's own headers written out in place, each once.

    A cached cubin is looked up by its source text, so the headers have to be part of that text.
    """
    seen: set[str] = set()

    def join(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (kernels_directory() / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda match: join(match[1]), text)

    if unit not in WGMMA_UNITS:
        return join(unit + ".cu")
    dtype, order, shape = WGMMA_UNITS[unit]
    defined = {"NAME": unit, "TYPE": WGMMA_TYPES[dtype], "SHAPE": f"hopper::Shape{shape}", "ORDER": order.upper()}
    return "".join(f"#define UNIT_{key} {value}\n" for key, value in defined.items()) + join("grouped_gemm_wgmma.cu")
