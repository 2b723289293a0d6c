"""The order in which shared and routed experts take turns, and when they do; no GPU needed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumoe.gpu import config
from cumoe.gpu.config import StackSizes
from cumoe.gpu.sources import kernels_directory

COUNTS = st.integers(0, 50)


def in_turn(position, shared, routed):
    """Return the place, in the order of stacks, of what comes at a position: a twin of Schedule."""
    turns = min(shared, routed)
    if position < 2 * turns:
        return position // 2 + position % 2 * shared
    return position - turns if routed < shared and position < shared + routed else position


@given(COUNTS, COUNTS)
def test_every_place_comes_once(shared, routed):
    """In turn as long as there are both; each kind in its own order; what follows the product stays where it is."""
    places = [in_turn(position, shared, routed) for position in range(shared + routed + 5)]
    assert sorted(places) == list(range(shared + routed + 5))
    assert places[shared + routed :] == list(range(shared + routed, shared + routed + 5))
    kinds = [place < shared for place in places[: shared + routed]]
    assert kinds[: 2 * min(shared, routed)] == [True, False] * min(shared, routed)
    for wanted in (True, False):
        own = [place for place, kind in zip(places, kinds, strict=False) if kind == wanted]
        assert own == sorted(own)


def alternates(*sizes):
    """Return whether the layer's tile takes turns, for (num_experts, num_rows, weight_rows) of every stack."""
    stacks = tuple(StackSizes(*size, 4096) for size in sizes)
    return config.alternates(config.select_config("wgmma", (stacks,)), stacks)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("DeepSeek-V2-Lite, 256 tokens: a smaller tile", False),
        ("DeepSeek-V2-Lite, 512 tokens", True),
        ("Llama-4-Scout, 144 tokens: shared experts read as much as they multiply", False),
        ("Llama-4-Scout, 145 tokens", True),
        ("Llama-4-Scout, 2304 tokens", True),
        ("Llama-4-Scout, 2305 tokens: routed experts multiply as much", False),
        ("DeepSeek-V2-Lite, 1024 tokens", True),
        ("DeepSeek-V2-Lite, 1025 tokens: shared experts do a third of the work", False),
        ("Qwen3-Next-80B, 2048 tokens: shared experts have next to nothing to do", False),
        ("Qwen3-30B-A3B, 512 tokens: there are none", False),
    ],
)
def test_layers_that_take_turns(layer, expected):
    """From the second run of shared rows on: up to 96 rows an expert for an eighth of the routed work, 144 for half."""
    name, tokens = layer.split(" tokens")[0].rsplit(", ", 1)
    experts, top_k, width, shared = {
        "DeepSeek-V2-Lite": (64, 6, 1408, (1408, 1408)),
        "Llama-4-Scout": (16, 1, 8192, (8192,)),
        "Qwen3-Next-80B": (512, 10, 512, (512,)),
        "Qwen3-30B-A3B": (128, 8, 768, ()),
    }[name]
    rows = int(tokens)
    assert alternates((experts, rows * top_k, 2 * width), *((1, rows, 2 * own) for own in shared)) is expected


def test_only_some_tiles_take_turns():
    """Those of the kernels that are compiled for it."""
    stacks = (StackSizes(16, 512, 512, 512), StackSizes(1, 512, 512, 512))
    own = {tile.name for tile in config.CONFIGS if config.alternates(tile, stacks)}
    assert own == set(config.ALTERNATING_TILES)
    assert {tile.block_m for tile in config.CONFIGS if tile.name in own} == {144}
    assert "ALTERNATES = ROWS == 144;" in (kernels_directory() / "tiles_sm90.cuh").read_text(encoding="utf-8")
