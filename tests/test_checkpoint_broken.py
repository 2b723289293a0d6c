"""Everything that can be wrong with a checkpoint, or with what is asked of it: one sentence each."""

import json

import numpy as np
import pytest
from checkpoint_files import MIXTRAL, header_of, mixtral, write_checkpoint, write_tensors

import cumoe
from cumoe.checkpoint.files import INDEX, SINGLE
from cumoe.checkpoint.names import layer_numbers

pytest.importorskip("safetensors")

W1 = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
GATE = "model.layers.0.block_sparse_moe.gate.weight"


def changed(**values):
    """Return a change of config.json."""

    def change(folder, arrays):
        (folder / "config.json").write_text(json.dumps(MIXTRAL | values))

    return change


def replaced(name, array):
    """Return a change of one tensor; None takes it away."""

    def change(folder, arrays):
        others = {other: found for other, found in arrays.items() if other != name}
        write_tensors(folder / SINGLE, others if array is None else others | {name: array})

    return change


def written(name, data):
    """Return a change of the bytes of a file; None takes it away."""

    def change(folder, arrays):
        path = folder / name
        path.unlink() if data is None else path.write_bytes(data(path.read_bytes()) if callable(data) else data)

    return change


def header(**entries):
    """Return a change of the header."""
    return lambda folder, arrays: write_tensors(folder / SINGLE, arrays, **entries)


def float8(folder, arrays):
    """Turn one matrix into 8-bit numbers."""
    arrays = arrays | {W1: np.zeros((24, 40), np.uint8)}
    write_tensors(folder / SINGLE, arrays, **{W1: header_of(arrays)[W1] | {"dtype": "F8_E4M3"}})


def entry(dtype="F32", shape=(24, 40), begin=0, end=24 * 40 * 4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BROKEN = {
    "no config": (written("config.json", None), FileNotFoundError, r"config.json: expected a file, got none"),
    "config is no JSON": (written("config.json", b"{"), ValueError, r"config.json: expected JSON, got"),
    "config is a list": (written("config.json", b"[]"), ValueError, r"config.json: expected a JSON object, got list"),
    "no model_type": (changed(model_type=None), ValueError, r"config.json: expected a model_type, got None"),
    "unknown family": (
        changed(model_type="switch"), ValueError, r"model_type: expected afmoe, .*, mixtral, .* got 'switch'",
    ),
    "quantised": (
        changed(quantization_config={"quant_method": "fp8"}), ValueError,
        r"config.json: expected a checkpoint in float32, float16 or bfloat16, got a quantised one: quant_method='fp8'",
    ),
    "quantised without saying so": (
        replaced(W1 + "_scale_inv", np.ones((1, 1), np.float32)), ValueError, r"got quantised: .*w1.weight_scale_inv",
    ),
    "unknown activation": (changed(hidden_act="xielu"), ValueError, r"activation: expected gelu, .* got 'xielu'"),
    "too many experts a token": (changed(num_experts_per_tok=5), ValueError, r"top_k: expected an int from 1 to 4"),
    "no experts a token": (changed(num_experts_per_tok=None), TypeError, r"experts a token: expected an int"),
    "other hidden size": (changed(hidden_size=48), ValueError, r"gate.weight: .*\(4, 48\), got \(4, 40\)"),
    "other number of experts": (changed(num_local_experts=8), ValueError, r"gate.weight: .*\(8, 40\), got \(4, 40\)"),
    "other width": (changed(intermediate_size=32), ValueError, r"w2.weight: expected intermediate_size=32, .* got 24"),
    "no weights": (written(SINGLE, None), FileNotFoundError, r"expected safetensors files, got only \['.json'\]"),
    "empty file": (written(SINGLE, b""), ValueError, r"expected a safetensors file with a header of 0 bytes, got 0"),
    "truncated header": (written(SINGLE, lambda data: data[:100]), ValueError, r"a header of \d+ bytes, got 100 bytes"),
    "header is no JSON": (written(SINGLE, b"\2\0\0\0\0\0\0\0}{"), ValueError, r"a safetensors header, got JSON"),
    "truncated file": (
        written(SINGLE, lambda data: data[:-1]), ValueError, r"expected \d+ bytes, as its header says, got .*truncated",
    ),
    "offsets beyond the file": (header(**{W1: entry(begin=10**9, end=10**9 + 3840)}), ValueError, r"truncated"),
    "negative offsets": (header(**{W1: entry(begin=-8)}), ValueError, r"expected a safetensors header, got ValueError"),
    "offsets without an end": (
        header(**{W1: {"dtype": "F32", "shape": [1]}}), ValueError, r"expected a safetensors header, got KeyError",
    ),
    "overlapping tensors": (header(**{W1: entry()}), ValueError, r"expected a safetensors file, got .*"),
    "bytes that are not the shape": (header(**{W1: entry(shape=(24, 41))}), ValueError, r"984 numbers of F32 .* 3840"),
    "experts without a router": (
        replaced(GATE, None), ValueError, r"checkpoint: expected a tensor model.layers.0.*gate.weight in .*, got none",
    ),
    "a number that is a word": (
        changed(num_local_experts="4"), TypeError, r"config.json: num_experts: expected an int, got str",
    ),
    "a number of layers that is none": (
        changed(num_hidden_layers=0), ValueError, r"config.json: num_hidden_layers: expected at least 1, got 0",
    ),
    "list that is too short": (
        changed(num_experts_per_tok=[]), ValueError, r"num_experts_per_tok: expected an item for layer 0, got 0 items",
    ),
    "missing tensor": (
        replaced(W1, None), ValueError, r"experts.1.w1.weight: expected a tensor of this name in .*, got none",
    ),
    "wrong shape": (
        replaced(W1, np.zeros((40, 24), np.float32)), ValueError, r"w1.weight: .* shape \(24, 40\), got \(40, 24\)",
    ),
    "wrong rank": (
        replaced(W1.replace("1.w1", "0.w2"), np.zeros(24, np.float32)), ValueError, r"w2.weight: expected a shape",
    ),
    "unlike dtype": (
        replaced(W1, np.zeros((24, 40), np.float16)), TypeError, r"w1.weight: expected dtype float32, .* got F16",
    ),
    "whole numbers": (
        replaced(W1, np.zeros((24, 40), np.int8)), TypeError, r"w1.weight: expected dtype float32, .* got I8 \(quant",
    ),
    "a dtype that NumPy lacks": (float8, TypeError, r"w1.weight: expected dtype float32, .* got F8_E4M3 \(quantised"),
    "router of one dimension": (
        replaced(GATE, np.zeros(160, np.float32)), ValueError, r"gate.weight: .*\(num_experts, hidden_size\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("trouble", BROKEN)
def test_a_broken_checkpoint_is_refused(checkpoint, arrays, trouble):
    """In one sentence that says what was found and what was expected."""
    change, error, message = BROKEN[trouble]
    change(checkpoint, arrays)
    with pytest.raises(error, match=message) as refused:
        cumoe.load(checkpoint, 0, device="cpu")
    assert "\n" not in str(refused.value)
    with pytest.raises(error, match=message):
        cumoe.layers(checkpoint)


@pytest.mark.parametrize(("layer", "error", "message"), [
    (1, ValueError, r"layer: expected one of the layers with experts \(0, 2\), got 1, which has no experts"),
    (3, ValueError, r"layer: expected one of the layers with experts \(0, 2\), got 3 of 3 layers"),
    (-1, ValueError, r"layer: expected at least 0, got -1"),
    ("0", TypeError, r"layer: expected an int, got str"),
])  # fmt: skip
def test_a_layer_without_experts_is_refused(checkpoint, layer, error, message):
    with pytest.raises(error, match=message):
        cumoe.load(checkpoint, layer, device="cpu")


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"device": "tpu"}, ValueError, r"device: expected 'auto', 'gpu' or 'cpu', got 'tpu'"),
    ({"progress": True}, TypeError, r"progress: expected one of the words 'bar' or 'none', got bool"),
    ({"dtype": np.float16}, ValueError, r"dtype: expected None or float32"),
])  # fmt: skip
def test_options_are_words(checkpoint, options, error, message):
    with pytest.raises(error, match=message):
        cumoe.load(checkpoint, 0, **options)


def test_a_gpu_that_is_not_there(checkpoint, monkeypatch):
    """Asked for by name it is missed; "auto" takes the CPU."""
    monkeypatch.setattr("cumoe.checkpoint.load.gpu_is_there", lambda: False)
    with pytest.raises(RuntimeError, match="device: expected a machine with a GPU for 'gpu', got none"):
        cumoe.load(checkpoint, 0, device="gpu")
    assert cumoe.load(checkpoint, 0).kind.device == "cpu"


def test_a_path_that_is_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: expected the folder of a checkpoint, got .*nowhere"):
        cumoe.load(tmp_path / "nowhere", 0)


def test_an_index_that_is_none(tmp_path, arrays):
    """And one that names a tensor which its file does not hold."""
    folder = write_checkpoint(tmp_path / "c", MIXTRAL, arrays, 2)
    index = json.loads((folder / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))
    index["weight_map"][W1] = first if index["weight_map"][W1] == second else second
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"w1.weight: expected a tensor of this name in model-.*, as model"):
        cumoe.load(folder, 0, device="cpu")
    (folder / INDEX).write_text("{}")
    with pytest.raises(ValueError, match=r"expected a weight_map from tensors to files, got NoneType"):
        cumoe.load(folder, 0, device="cpu")


def test_a_layer_without_experts_at_all(tmp_path, rng):
    folder = write_checkpoint(tmp_path / "c", MIXTRAL, mixtral(rng, layers=()))
    assert cumoe.layers(folder) == []
    with pytest.raises(ValueError, match=r"\(none: no tensor is one of experts\)"):
        cumoe.load(folder, 0, device="cpu")


def test_layer_numbers_are_short():
    assert layer_numbers([0, 2, 3, 4, 6, 7]) == "0, 2 to 4, 6, 7"
    assert layer_numbers([]) == ""
