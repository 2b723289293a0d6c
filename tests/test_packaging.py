"""What must agree between pyproject.toml, Python and the CUDA sources; no GPU needed."""

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumoe.data.routing import GPU_MAX_EXPERTS
from cumoe.gpu import (
    combine,
    config,
    ends,
    gate,
    group,
    grouped_gemm,
    route,
    route_and_count,
    route_and_group,
    router_gemm,
    sources,
    stacks,
)
from cumoe.gpu.compile import KERNEL_UNIT
from cumoe.gpu.tensor_map import BOXES, MAP_BYTES

ROOT = Path(__file__).resolve().parent.parent
UNITS = sources.UNITS + tuple(sources.WGMMA_UNITS)
CUDA = {path.name: path.read_text(encoding="utf-8") for path in sorted(sources.kernels_directory().glob("*.cu*"))}
SMALLEST_SHARED_BYTES = 101_376  # what one block may have on sm_86, sm_89 and sm_120
HOPPER_SHARED_BYTES = 232_448  # the same on sm_90, static shared memory included
HOPPER_SM_BYTES, RESERVED_BYTES = 233_472, 1024  # of an SM; of them for every block on it
MAX_GROUPS = GPU_MAX_EXPERTS + grouped_gemm.MAX_STACKS

WGMMA_TILES = [tile for tile in config.CONFIGS if tile.engine == "wgmma"]

LAUNCHES = {
    "CombineLaunch": combine.LAUNCH,
    "ExpertStack": stacks.STACK,
    "FinishLaunch": ends.FINISH_LAUNCH,
    "GateLaunch": gate.LAUNCH,
    "GroupLaunch": group.LAUNCH,
    "NormLaunch": ends.NORM_LAUNCH,
    "RouterGemmLaunch": router_gemm.LAUNCH,
    "RouterLaunch": route.LAUNCH,
}
CODES = {"int64": "q", "int": "i", "float": "f"}


def cuda_fields(struct):
    """Return (name, type code) of the fields of a struct in the CUDA sources, nested ones written out.

    A nested struct's field `name` has the name of the whole.
    """
    text = "\n".join(CUDA.values())
    body = re.search(rf"^struct {struct} {{\n(.*?)^}};", text, re.MULTILINE | re.DOTALL)[1]
    found = []
    for kind, star, names in re.findall(r"(?:const )?(\w+)(\*?) ([\w, ]+);", re.sub(r"//.*", "", body)):
        for name in names.split(", "):
            if star or kind in CODES:
                found.append((name, "Q" if star else CODES[kind]))
            else:
                found += [(name if inner == "name" else inner, code) for inner, code in cuda_fields(kind)]
    return found


def constant(text):
    """Evaluate an expression of numbers and MAX_STACKS."""
    return eval(text, {"__builtins__": {}}, {"MAX_STACKS": grouped_gemm.MAX_STACKS})


def number(name):
    """Return a number that the CUDA sources define once, as ``name = number``."""
    (found,) = re.findall(rf"\b{name} = (\d+)\b", "\n".join(CUDA.values()))
    return int(found)


def test_the_sources_are_found():
    """In the checkout or in the installed package; every .cu file is a unit, or the one of all Hopper units."""
    files = {f"{unit}.cu" for unit in (*sources.UNITS, "grouped_gemm_wgmma")}
    assert files == {name for name in CUDA if name.endswith(".cu")}


def test_struct_sizes_are_those_that_python_packs():
    """Every asserted struct has a twin, and every twin is asserted."""
    asserted = {
        struct: constant(size)
        for text in CUDA.values()
        for struct, size in re.findall(r"static_assert\(sizeof\((\w+)\) == ([^,]+),", text)
    }
    packed = {struct: twin.itemsize for struct, twin in LAUNCHES.items()}
    portable = grouped_gemm.MAX_STACKS * stacks.STACK.itemsize + grouped_gemm.PORTABLE_TAIL.itemsize
    both = route.LAUNCH.itemsize + group.LAUNCH.itemsize + route_and_group.TAIL.itemsize
    counted = route.LAUNCH.itemsize + group.LAUNCH.itemsize + route_and_count.TAIL.itemsize
    others = {
        "GemmLaunch": portable,
        "WgmmaLaunch": grouped_gemm.WGMMA_BYTES,
        "RouteAndGroupLaunch": both,
        "RouteAndCountLaunch": counted,
    }
    assert asserted == packed | others
    both = 2 * grouped_gemm.MAX_STACKS * (3 * MAP_BYTES + stacks.STACK.itemsize)
    assert both + grouped_gemm.WGMMA_TAIL.itemsize <= grouped_gemm.WGMMA_BYTES
    assert f"MAX_STACKS = {grouped_gemm.MAX_STACKS};" in CUDA["stacks.cuh"]


def overlapped():
    """Return the beginnings of kernel names in the functions of the package that launch with ``overlap``."""
    found = set()
    for path in sorted((ROOT / "cumoe" / "gpu").glob("*.py")):
        functions = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
        calls = {
            function: [node for node in ast.walk(function) if isinstance(node, ast.Call)] for function in functions
        }
        for function, own in calls.items():
            named = [call for call in own if getattr(call.func, "id", "") == "launch"]
            if not any(word.arg == "overlap" for call in named for word in call.keywords):
                continue
            callers = [call for others in calls.values() for call in others]
            texts = [function] + [call for call in callers if getattr(call.func, "id", "") == function.name]
            found |= {node.value for text in texts for node in ast.walk(text) if isinstance(node, ast.Constant)}
    return {text for text in found if isinstance(text, str) and units_of(text)}


def units_of(beginning):
    """Return the units with kernels whose names begin so."""
    if re.fullmatch(r"[a-z]\w+", beginning) is None:
        return set()
    return {
        unit for prefix, unit in KERNEL_UNIT.items() if beginning.startswith(prefix) or prefix.startswith(beginning)
    }


def test_a_kernel_that_may_begin_early_waits():
    """Its results would be read, or its operands written, before the previous kernel has ended."""
    beginnings = overlapped()
    assert {"combine_", "ends_finish_", "ends_rms_norm_", "shared_gate_", "grouped_gemm_wgmma_"} <= beginnings
    assert {"route_and_group_", "router_gemm_", "group_place"} <= beginnings
    for beginning in beginnings:
        for unit in units_of(beginning):
            assert "wait_for_previous_kernel();" in sources.unit_source(unit), (beginning, unit)
    for unit in ("ends", "gate", "combine"):  # the first word of each kernel
        bodies = re.findall(
            r"__device__ __forceinline__ void \w+\(const \w+Launch& p\) {\n(.*?)^}", CUDA[f"{unit}.cu"], re.M | re.S
        )
        assert bodies
        for body in bodies:
            lines = [line.strip() for line in body.splitlines() if not line.lstrip().startswith("__shared__")]
            assert lines[0] == "wait_for_previous_kernel();", body


@pytest.mark.parametrize("struct", LAUNCHES)
def test_struct_fields_lie_where_python_packs_them(struct):
    """The same names and types in the same order."""
    packed = LAUNCHES[struct]
    assert cuda_fields(struct) == list(zip(packed.names, packed._struct.format.removeprefix("="), strict=True))


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_one_text_with_each_header_once(unit):
    """Nothing of the project is left to include, and nothing comes twice."""
    text = sources.unit_source(unit)
    assert '#include "' not in text
    assert "#pragma once" not in text
    for name, body in CUDA.items():
        first_line = body.splitlines()[0]
        assert text.count(first_line) <= 1, name


def test_every_kernel_has_a_unit_and_every_unit_kernels():
    """The table that finds a kernel names the units that are compiled."""
    assert set(KERNEL_UNIT.values()) == set(UNITS)
    for prefix, unit in KERNEL_UNIT.items():
        assert prefix in sources.unit_source(unit)


def test_every_name_that_the_hopper_dispatch_can_form_is_a_kernel():
    """The macros of all units, expanded by hand, give these names and no other."""
    defined = {}
    for unit in sources.WGMMA_UNITS:
        text = sources.unit_source(unit)
        values = dict(re.findall(r"^#define UNIT_(\w+) (\S+)$", text, re.M))
        assert re.findall(r"^    UNIT_NAME\(", text, re.M) == ["    UNIT_NAME("]
        defined[values["NAME"]] = (values["TYPE"], values["ORDER"], values["SHAPE"], unit)
    named = {
        f"grouped_gemm_wgmma_{dtype}_{order}_{tile.name}": (
            {"bfloat16": "bf16", "float16": "fp16"}[dtype],
            order.upper(),
            f"hopper::Shape{tile.name}",
            f"grouped_gemm_wgmma_{dtype}_{order}_{tile.name}",
        )
        for dtype in ("bfloat16", "float16")
        for order in ("inner_major", "row_major")
        for tile in WGMMA_TILES
    }
    assert defined == named
    for name, (*_, unit) in named.items():
        assert {of for start, of in KERNEL_UNIT.items() if name == start or name.startswith(start + "_")} == {unit}


def test_tiles_are_those_of_the_kernels():
    """The tensor-core shapes and the numbers of the float32 kernel, read from the sources."""
    fields = r"HALF = (\d+), BLOCK_K = (\d+), STAGES = (\d+), BLOCKS_PER_SM = (\d+)"
    shapes = re.findall(rf"struct TileShape<(\d+)> {{[^=]*{fields}", CUDA["grouped_gemm_mma.cuh"])
    simt = re.search(r"BLOCK_M = (\d+), HALF = (\d+), .*BLOCK_K = (\d+), THREADS = (\d+)", CUDA["grouped_gemm_simt.cu"])
    assert [tuple(map(int, shape)) for shape in shapes] == [tuple(c[1:6]) for c in config.CONFIGS if c.engine == "mma"]
    assert [tuple(c[1:4]) for c in config.CONFIGS if c.engine == "simt"] == [tuple(map(int, simt.groups()[:3]))]
    assert int(simt[4]) == config.THREADS
    assert f"THREADS = {config.THREADS}," in CUDA["grouped_gemm_mma.cuh"]


def test_hopper_tiles_are_those_of_the_kernels():
    """Rows, warpgroups and blocks of an SM as the sources have them; a warpgroup has 64 weight rows of each half."""
    text = "\n".join(CUDA.values())
    shapes = re.findall(r"using Shape(\w+) = TileShape<(\d+), (\d+), (\d+), (\w+)(?:, (\d+))?(?:, (\w+))?>;", text)
    inner = int(re.search(r"\bBLOCK_K = (\d+), ROW_BYTES = ", text)[1])
    assert len(shapes) == len(WGMMA_TILES)
    for shape, tile in zip(shapes, WGMMA_TILES, strict=True):
        name, (block_m, consumers, blocks) = shape[0], map(int, shape[1:4])
        assert (name, shape[4], int(shape[5] or 1)) == (tile.name, tile.halves.upper(), tile.cluster)
        assert {"": "any", "FEW": "few"}[shape[6]] == tile.slots
        assert (block_m, 64 * consumers, inner, blocks) == (tile.block_m, tile.half, tile.block_k, tile.blocks_per_sm)
        assert tile.threads == (2 + consumers) * number("WARPGROUP")
        assert 2 <= tile.stages <= tile.alone().stages <= number("MAX_STAGES")
    assert (number("RUN"), number("ROWS_OF_BOX")) == BOXES


def test_the_smallest_slab_is_that_of_the_kernels():
    """Sixteen rows of two float32 halves; its rows are padded."""
    text = "\n".join(CUDA.values())
    pitch = number("RUN") + int(re.search(r"SLAB_PITCH = RUN \+ (\d+);", text)[1])
    assert 2 * 16 * pitch * 4 == config.SMALLEST_SLAB_BYTES
    assert "2 * 16 * SLAB_PITCH * 4" in text


@pytest.mark.parametrize("tile", [tile for tile in config.CONFIGS if tile.engine != "wgmma"], ids=str)
def test_shared_memory_suffices_everywhere(tile):
    """Also with as many groups as a launch can have: all routed experts and a shared expert in every other stack."""
    assert tile.shared_bytes(MAX_GROUPS) <= SMALLEST_SHARED_BYTES


def test_shared_memory_suffices_for_grouping():
    """On every GPU; a histogram a warp is the larger part of it."""
    for size in (group.bytes_to_place, group.bytes_to_place_all):
        assert size(GPU_MAX_EXPERTS) <= SMALLEST_SHARED_BYTES


def hopper_bytes(tile, num_groups):
    """Return the shared memory of a block, with what the kernel declares: ring, barriers, totals of the scan."""
    places = 2 if tile.block_m > 64 else 4
    assert "RING = ROWS > 64 ? 2 : 4;" in CUDA["tiles_sm90.cuh"]
    ring = places * (3 * tile.block_m * 4 + 32)
    barriers = 8 * (2 * number("MAX_STAGES") + 4 * places + 3 + 1)  # the last is the position in the mail
    return tile.shared_bytes(num_groups) + ring + barriers + tile.threads // 32 * 4


@pytest.mark.parametrize("tile", WGMMA_TILES, ids=str)
def test_shared_memory_of_hopper_suffices(tile):
    """One block with as many groups as a launch can have; as many blocks as are wanted with 512 experts."""
    for shape in (tile, tile.alone()):
        assert hopper_bytes(shape, MAX_GROUPS) <= HOPPER_SHARED_BYTES
    block = hopper_bytes(tile, 512 + grouped_gemm.MAX_STACKS) + RESERVED_BYTES
    assert tile.blocks_per_sm * block <= HOPPER_SM_BYTES


STACKS = st.lists(
    st.tuples(st.lists(st.integers(0, 300), min_size=1, max_size=12), st.integers(1, 400), st.booleans()),
    min_size=1,
    max_size=4,
)


@given(STACKS, st.sampled_from(config.CONFIGS), st.integers(0, 300))
def test_max_tiles_bounds_the_tiles_of_any_routing(drawn, tile, without_expert):
    """A random number of rows for every expert, and rows that no expert has."""
    sizes, tiles = [], 0
    for rows_of, width, paired in drawn:
        weight_rows = 2 * width if paired else width
        sizes.append(config.StackSizes(len(rows_of), sum(rows_of) + without_expert, weight_rows, 64))
        per_block = tile.half * (1 if paired else 2)
        n_blocks = -(-width // per_block)
        tiles += sum(-(-rows // tile.block_m) for rows in rows_of) * n_blocks
    assert tiles <= config.max_tiles(tile, tuple(sizes))
    grid = config.grid_size(tile, config.max_tiles(tile, tuple(sizes)), 132)
    assert 0 <= grid <= 132 * tile.blocks_per_sm
    assert grid > 0 or tiles == 0


@given(st.sampled_from(["mma", "simt"]), st.integers(1, 64), st.integers(0, 10_000))
def test_the_chosen_tile_holds_the_mean_expert_or_is_the_largest(engine, num_experts, num_rows):
    """And no smaller tile would hold it."""
    tile = config.select_config(engine, ((config.StackSizes(num_experts, num_rows, 64, 64),),))
    mean = -(-num_rows // num_experts)
    heights = [other.block_m for other in config.CONFIGS if other.engine == engine]
    assert tile in config.CONFIGS
    assert tile.block_m >= mean or tile.block_m == max(heights)
    assert not any(mean <= smaller < tile.block_m for smaller in heights)


def test_every_package_and_the_kernels_are_installed():
    """pyproject.toml lists the folders by hand; the kernels are one of them."""
    tomllib = pytest.importorskip("tomllib")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "cumoe").rglob("__init__.py")}
    on_disk = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(setuptools["packages"]) == on_disk | {"cumoe.kernels"}
    assert setuptools["package-dir"]["cumoe.kernels"] == "kernels"
    patterns = setuptools["package-data"]["cumoe.kernels"]
    for path in (ROOT / "kernels").iterdir():
        assert any(path.match(pattern) for pattern in patterns), path
