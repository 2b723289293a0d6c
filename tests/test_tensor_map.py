"""What the tensor maps of the Hopper kernels read; no GPU needed."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from support import DTYPES

from cumoe.gpu import config, tensor_map
from cumoe.gpu.stacks import strides

TILES = [tile for tile in config.CONFIGS if tile.engine == "wgmma"]


@pytest.fixture
def encoded(monkeypatch):
    """Return the list of arguments with which maps are encoded."""
    calls = []
    monkeypatch.setattr(tensor_map, "_encode", lambda *arguments: calls.append(arguments) or b"")
    return calls


def placed(array, transposed=False, pad=0, before=0):
    """Return (what CuPy would show of the array, memory): rows `pad` elements apart, `before` elements in front."""
    inside = array.swapaxes(-1, -2) if transposed else array
    wide = np.full((*inside.shape[:-1], inside.shape[-1] + pad), 65535, array.dtype)
    wide[..., : inside.shape[-1]] = inside
    view = wide[..., : inside.shape[-1]]
    view = view.swapaxes(-1, -2) if transposed else view
    memory = np.concatenate([np.full(before, 65535, array.dtype), wide.ravel()])
    seen = SimpleNamespace(
        data=SimpleNamespace(ptr=2 * before), dtype=DTYPES["bfloat16"], shape=array.shape, strides=view.strides,
        ndim=array.ndim,
    )  # fmt: skip
    return seen, memory


def read_box(memory, call, corner):
    """Return what TMA would write for a box at `corner` (innermost axis first): zeros beyond the lengths."""
    pointer, _, lengths, steps, box, _ = call
    index = np.indices(box[::-1])[::-1] + np.array(corner).reshape(-1, *[1] * len(box))
    exists = np.logical_and.reduce([(i >= 0) & (i < length) for i, length in zip(index, lengths, strict=True)])
    at = pointer + 2 * index[0] + sum(i * step for i, step in zip(index[1:], steps, strict=True))
    assert (at[exists] < 2 * memory.size).all()
    return np.where(exists, memory[np.where(exists, at, 0) // 2], 0).reshape(-1, box[0])


def check_legal(call):
    """Fail where the driver would refuse."""
    pointer, dtype, lengths, steps, box, lines = call
    assert pointer % 16 == 0 and dtype in ("bfloat16", "float16")
    assert all(1 <= length <= 2**32 for length in lengths)
    assert all(0 < step < 2**40 and step % 16 == 0 for step in steps)
    assert all(1 <= edge <= 256 for edge in box) and box[0] * 2 <= 128
    assert lines in tensor_map.LINES.values()


def weight_tile(memory, call, order, tile, paired, weight_block, expert, inner):
    """Return the two halves (half, HALF_ROWS, 64) that a stage gets, as bring_half asks for them."""
    inward = is_inward(tile, paired, order)
    halves = []
    for half in range(2):
        row = (weight_block if paired or inward else 2 * weight_block + half) * tile.half
        pair_half, position = half if paired else 0, inner + 64 * half if inward else inner
        if inward and paired:
            halves.append(read_box(memory, call, (position, 0, 0, row // 16, expert)))
        elif order == "inner_major":
            halves.append(read_box(memory, call, (position, row, pair_half, expert)))
        else:
            runs = range(row, row + tile.half, 64)
            boxes = [read_box(memory, call, (run, position, pair_half, expert)) for run in runs]
            halves.append(np.concatenate([box.T for box in boxes]))
    return np.stack(halves)


def is_inward(tile, paired, order):
    """Return whether the halves are the same weight rows at the next inner positions."""
    return tile.halves == "inner" and (not paired or order == "inner_major")


def wanted_tile(w, layout, tile, paired, order, weight_block, expert, inner):
    """Return the same from the definition: gate and up rows of the same features, or neighbours."""
    rows = w.shape[1]
    gate, up = {
        "stacked": (range(rows // 2), range(rows // 2, rows)),
        "interleaved": (range(0, rows, 2), range(1, rows, 2)),
        "ungated": (range(rows), range(rows)),
    }[layout if paired else "ungated"]
    inward = is_inward(tile, paired, order)
    if inward and paired:  # eight gate and eight up rows in turn
        gate = up = [
            rows[i] for first in range(0, len(gate), 8) for rows in (gate, up) for i in range(first, first + 8)
        ]
    wanted = np.zeros((2, tile.half, 64), w.dtype)
    for half, those in enumerate((gate, up)):
        begin = (weight_block if paired or inward else 2 * weight_block + half) * tile.half
        position = inner + 64 * half if inward else inner
        part = w[expert][list(those[begin : begin + tile.half]), position : position + 64]
        wanted[half, : part.shape[0], : part.shape[1]] = part
    return wanted


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("order", ["inner_major", "row_major"])
@pytest.mark.parametrize("layout", ["stacked", "interleaved", "ungated"])
@pytest.mark.parametrize(
    ("shape", "pad"), [((3, 208, 72), 0), ((3, 208, 72), 8), ((1, 16, 136), 0), ((2, 16, 8), 8), ((1, 16, 1), 8)]
)
def test_weight_maps_read_the_rows_of_a_tile(encoded, tile, order, layout, shape, pad):
    """Both halves of every tile, zeros beyond the weights, nothing of the padding."""
    if shape[2] == 1:
        pad = 7 if order == "inner_major" else 0  # rows at multiples of 16 bytes
    w = np.arange(1, 1 + np.prod(shape), dtype=np.uint16).reshape(shape)
    seen, memory = placed(w, transposed=order == "row_major", pad=pad, before=24)
    tensor_map.weight_map(seen, strides(seen), layout, order, tile)
    (call,) = encoded
    check_legal(call)
    paired = layout == "stacked" or (layout == "interleaved" and order == "inner_major")
    inward = is_inward(tile, paired, order)
    weight_blocks = -(-shape[1] // (tile.half if inward else 2 * tile.half))
    step = 128 if inward else 64
    for expert, block, inner in product(range(shape[0]), range(weight_blocks), range(0, shape[2], step)):
        got = weight_tile(memory, call, order, tile, paired, block, expert, inner)
        assert (got == wanted_tile(w, layout, tile, paired, order, block, expert, inner)).all(), (expert, block, inner)


@pytest.mark.parametrize(
    ("layout", "order", "lengths", "steps"),
    [
        ("stacked", "inner_major", (72, 104, 2, 3), (144, 104 * 144, 208 * 144)),
        ("interleaved", "inner_major", (72, 104, 2, 3), (288, 144, 208 * 144)),
        ("ungated", "inner_major", (72, 208, 1, 3), (144, 16, 208 * 144)),
        ("stacked", "row_major", (104, 72, 2, 3), (416, 208, 72 * 416)),
        ("interleaved", "row_major", (208, 72, 1, 3), (416, 16, 72 * 416)),
        ("ungated", "row_major", (208, 72, 1, 3), (416, 16, 72 * 416)),
    ],
)
def test_lengths_and_steps_of_weight_maps(encoded, layout, order, lengths, steps):
    """The numbers themselves, for weights (3, 208, 72); steps in bytes."""
    seen, _ = placed(np.zeros((3, 208, 72), np.uint16), transposed=order == "row_major")
    tensor_map.weight_map(seen, strides(seen), layout, order, TILES[-1])
    box = (64, 128 if order == "inner_major" else 64, 1, 1)
    assert encoded == [(0, "bfloat16", lengths, steps, box, 3)]


@pytest.mark.parametrize(
    ("layout", "steps"),
    [
        ("stacked", (144, 104 * 144, 8 * 144, 208 * 144)),
        ("interleaved", (288, 144, 16 * 144, 208 * 144)),
    ],
)
def test_lengths_and_steps_of_woven_pairs(encoded, layout, steps):
    """Tiles for few rows read eight gate and eight up rows in turn, and no more than that; (3, 208, 72) again."""
    seen, _ = placed(np.zeros((3, 208, 72), np.uint16))
    for tile, groups in zip(TILES[:3], (4, 4, 8), strict=True):
        tensor_map.weight_map(seen, strides(seen), layout, "inner_major", tile)
        assert encoded.pop() == (0, "bfloat16", (72, 8, 2, 13, 3), steps, (64, 8, 2, groups, 1), 2)


@pytest.mark.parametrize(("shape", "pad"), [((200, 72), 0), ((200, 72), 8), ((1, 136), 0), ((9, 8), 0), ((9, 1), 7)])
@pytest.mark.parametrize("box_rows", tensor_map.BOXES)
def test_row_maps_read_neighbouring_rows(encoded, shape, pad, box_rows):
    """From any first row; zeros beyond the last row and the last column."""
    a = np.arange(1, 1 + np.prod(shape), dtype=np.uint16).reshape(shape)
    seen, memory = placed(a, pad=pad, before=8)
    tensor_map.row_map(seen, strides(seen), box_rows)
    (call,) = encoded
    check_legal(call)
    for row, inner in product((0, 1, shape[0] // 2, shape[0] - 1), range(0, shape[1], 64)):
        wanted = np.zeros((box_rows, 64), np.uint16)
        part = a[row : row + box_rows, inner : inner + 64]
        wanted[: part.shape[0], : part.shape[1]] = part
        assert (read_box(memory, call, (inner, row, 0, 0)) == wanted).all()


def test_every_run_of_rows_fits_into_boxes_within_the_stage():
    """Boxes of 64 and of a few rows bring a run; a stage has no more than the tile's rows."""
    large, small = tensor_map.BOXES
    assert large % small == 0
    for tile in TILES:
        assert tile.block_m % small == 0
        assert all(-(-rows // small) * small <= tile.block_m for rows in range(1, tile.block_m + 1))
