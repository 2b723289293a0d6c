"""Loading layers of checkpoints: real files of several families, and everything that can be wrong with one."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import BF16, MIXTRAL, by_definition, header_of, mixtral, write_checkpoint, write_tensors
from support import CPU, assert_close

import cumoe
from cumoe.checkpoint.files import INDEX, SINGLE
from cumoe.checkpoint.names import layer_numbers

pytest.importorskip("safetensors")

RECORDED = sorted((Path(__file__).parent / "data" / "checkpoints").glob("*.safetensors"))


def device(backend):
    """Return the word of `load` for a backend."""
    return "cpu" if backend is CPU else "gpu"


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def arrays(rng):
    return mixtral(rng)


@pytest.fixture
def checkpoint(tmp_path, arrays):
    return write_checkpoint(tmp_path / "checkpoint", MIXTRAL, arrays)


def recorded(path, folder):
    """Return (folder of the checkpoint, arrays) of a recorded layer; config.json says what its case says."""
    case = dict(np.load(path.with_suffix(".npz")))
    about = json.loads(str(case.pop("config")))
    routing = about["routing"]
    shutil.copy(path, folder / SINGLE)
    config = {
        "model_type": about["family"],
        "hidden_size": about["H"],
        "num_experts": about["E"],
        "num_experts_per_tok": routing["top_k"],
        "norm_topk_prob": routing["renormalize"],
        "n_group": routing["n_group"],
        "topk_group": routing["topk_group"],
        "routed_scaling_factor": routing["routed_scaling_factor"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, case


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_layer_is_the_model(backend, path, tmp_path):
    """In float32, to which the stored bfloat16 converts exactly; in bfloat16 near that on the tokens it can hold."""
    folder, case = recorded(path, tmp_path)
    wide = cumoe.load(folder, 0, device=device(backend), dtype=np.float32, progress="none")
    assert_close(backend.asnumpy(wide(backend.asarray(case["x"]))), case["y"], np.float32)
    stored = cumoe.load(folder, 0, device=device(backend), progress="none")
    assert stored.experts.dtype == BF16
    x = case["x"].astype(BF16)
    expected = backend.asnumpy(wide(backend.asarray(x.astype(np.float32))))
    assert_close(backend.asnumpy(stored(backend.asarray(x))), expected, BF16)


@pytest.mark.parametrize("shards", [0, 1, 5])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_shards_do_not_matter(backend, tmp_path, rng, dtype, shards):
    """One file, one shard with an index, many."""
    arrays = mixtral(rng, dtype)
    folder = write_checkpoint(tmp_path / "c", MIXTRAL, arrays, shards)
    x = rng.standard_normal((9, 40)).astype(dtype)
    for number in (0, 2):
        layer = cumoe.load(folder, number, device=device(backend), max_tokens=9)
        assert layer.experts.dtype == dtype
        assert layer.router_weight.dtype == dtype
        y = backend.asnumpy(layer(backend.asarray(x)))
        assert_close(y, by_definition(arrays, x, number), dtype)


def test_files_without_an_index(tmp_path, arrays, rng):
    """The headers of all files are an index."""
    folder = write_checkpoint(tmp_path / "c", MIXTRAL, arrays, 3)
    (folder / INDEX).unlink()
    x = rng.standard_normal((5, 40), np.float32)
    assert_close(cumoe.load(folder, 2, device="cpu")(x), by_definition(arrays, x, 2), np.float32)


def test_only_the_files_of_the_layer_are_needed(tmp_path, arrays, rng):
    """A shard with nothing of layer 2 may be missing or broken."""
    folder = write_checkpoint(tmp_path / "c", MIXTRAL, {n: a for n, a in arrays.items() if ".layers.2." in n}, 2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= {name: "elsewhere.safetensors" for name in arrays if ".layers.2." not in name}
    (folder / INDEX).write_text(json.dumps(index))
    x = rng.standard_normal((5, 40), np.float32)
    assert_close(cumoe.load(folder, 2, device="cpu")(x), by_definition(arrays, x, 2), np.float32)
    with pytest.raises(FileNotFoundError, match=r"elsewhere.safetensors: expected a shard .* got no such file"):
        cumoe.load(folder, 0, device="cpu")


def test_layers_are_listed(checkpoint, arrays):
    """Number and shapes, dense layers left out."""
    found = cumoe.layers(checkpoint)
    size = sum(array.nbytes for name, array in arrays.items() if ".layers.2." in name)
    assert found == [cumoe.LayerShape(n, "mixtral", 40, 24, 4, 2, 0, "float32", size) for n in (0, 2)]


def test_listing_reads_no_weight(checkpoint, arrays):
    """A file whose weights are a hole of the right size is enough."""
    path = checkpoint / SINGLE
    size = path.stat().st_size
    header = path.read_bytes()[: size - sum(array.nbytes for array in arrays.values())]
    path.write_bytes(header)
    with path.open("r+b") as file:
        file.truncate(size)
    assert [shape.layer for shape in cumoe.layers(checkpoint)] == [0, 2]


@pytest.mark.parametrize("family", ["llama4", "gpt_oss"])
def test_packed_weights_stay_in_the_file(tmp_path, family):
    """On the CPU they are views of the mapped file, neither copied nor transposed."""
    folder, _ = recorded(next(path for path in RECORDED if path.stem == family), tmp_path)
    layer = cumoe.load(folder, 0, device="cpu")
    for weight in layer.experts.weights[:2]:
        assert not weight.flags.owndata
        assert not weight.flags.writeable
        assert weight.strides[-1] > weight.strides[-2]


def test_float32_parts_stay_float32(tmp_path, rng):
    """A float32 router beside bfloat16 experts is not rounded."""
    arrays = mixtral(rng, BF16)
    name = "model.layers.0.block_sparse_moe.gate.weight"
    arrays[name] = rng.standard_normal((4, 40), np.float32)
    layer = cumoe.load(write_checkpoint(tmp_path / "c", MIXTRAL, arrays), 0, device="cpu")
    assert layer.experts.dtype == BF16
    np.testing.assert_array_equal(layer.router_weight, arrays[name])
    assert layer.router_weight.dtype == np.float32


def test_other_stacks_of_layers_are_left_out(tmp_path, arrays, rng):
    """Prediction heads and towers have layers, and the heads even experts; further layers than config.json counts."""
    names = [name for name in arrays if ".layers.0." in name]
    more = {name.replace("model.layers.0.", "mtp.layers.0."): arrays[name] * 2 for name in names}
    more |= {name.replace("model.layers.0.", "model.layers.3."): arrays[name] * 2 for name in names}
    more["vision_tower.encoder.layers.0.mlp.up_proj.weight"] = arrays["model.norm.weight"]
    folder = write_checkpoint(tmp_path / "c", MIXTRAL, arrays | more)
    assert [shape.layer for shape in cumoe.layers(folder)] == [0, 2]
    x = rng.standard_normal((5, 40), np.float32)
    assert_close(cumoe.load(folder, 0, device="cpu")(x), by_definition(arrays, x, 0), np.float32)
    folder = write_checkpoint(tmp_path / "c", MIXTRAL, arrays | {"other." + name: arrays[name] for name in names})
    with pytest.raises(ValueError, match=r"expected one stack of layers with experts, got model.layers or other.model"):
        cumoe.layers(folder)


def test_missing_values_are_the_defaults_of_the_family(tmp_path, arrays, rng):
    """Sizes come from the tensors then."""
    config = {"model_type": "mixtral"}
    folder = write_checkpoint(tmp_path / "c", config, arrays)
    x = rng.standard_normal((5, 40), np.float32)
    assert_close(cumoe.load(folder, 0, device="cpu")(x), by_definition(arrays, x, 0), np.float32)


def test_a_list_has_an_item_a_layer(tmp_path, arrays, rng):
    """As Hunyuan writes its numbers."""
    config = MIXTRAL | {"num_experts_per_tok": [1, 0, 2], "num_local_experts": [4, 0, 4]}
    folder = write_checkpoint(tmp_path / "c", config, arrays)
    assert [shape.top_k for shape in cumoe.layers(folder)] == [1, 2]
    x = rng.standard_normal((5, 40), np.float32)
    y = cumoe.load(folder, 0, device="cpu")(x)
    assert_close(y, by_definition(arrays, x, 0, top_k=1), np.float32)


def test_the_text_part_of_a_composite(tmp_path, arrays, rng):
    """Its own model_type counts, if it has one."""
    moved = {name.replace("model.", "language_model.model.", 1): array for name, array in arrays.items()}
    for text in (MIXTRAL, {key: value for key, value in MIXTRAL.items() if key != "model_type"}):
        outer = "some_vision_model" if "model_type" in text else "mixtral"
        folder = write_checkpoint(tmp_path / "c", {"model_type": outer, "text_config": text}, moved)
        x = rng.standard_normal((5, 40), np.float32)
        assert_close(cumoe.load(folder, 2, device="cpu")(x), by_definition(arrays, x, 2), np.float32)


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_where_it_is_asked_for(checkpoint, capsys, monkeypatch, shown):
    """All bytes of the layer, on stderr; without tqdm nothing."""
    tqdm = pytest.importorskip("tqdm")
    seen = []

    class Bar(tqdm.tqdm):
        def update(self, n=1):
            seen.append(n)
            return super().update(n)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    cumoe.load(checkpoint, 0, device="cpu", progress="bar" if shown else "none")
    copied = 4 * 3 * 24 * 40 * 4  # the router stays in the file
    assert sum(seen) == (copied if shown else 0)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("package", ["tqdm", "safetensors"])
def test_without_an_extra(checkpoint, monkeypatch, package):
    """Tqdm is optional, safetensors is asked for by name."""
    monkeypatch.setitem(sys.modules, package, None)
    if package == "tqdm":
        assert cumoe.load(checkpoint, 0, device="cpu").experts.num_experts == 4
    else:
        with pytest.raises(ImportError, match=r'needs safetensors; pip install "cumoe\[hf\]"'):
            cumoe.load(checkpoint, 0, device="cpu")


def test_layer_numbers_are_short():
    assert layer_numbers([0, 2, 3, 4, 6, 7]) == "0, 2 to 4, 6, 7"
    assert layer_numbers([]) == ""


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
