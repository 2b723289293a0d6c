"""Loading layers of checkpoints: real files of several families, in shards, in parts, of composites."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import BF16, MIXTRAL, by_definition, mixtral, write_checkpoint
from support import CPU, assert_close

import cumoe
from cumoe.checkpoint.files import INDEX, SINGLE

pytest.importorskip("safetensors")

RECORDED = sorted((Path(__file__).parent / "data" / "checkpoints").glob("*.safetensors"))


def device(backend):
    """Return the word of `load` for a backend."""
    return "cpu" if backend is CPU else "gpu"


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
