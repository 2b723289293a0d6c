"""`cumoe inspect` and `cumoe run`: a table, a file in and a file out, and refusals in one line."""

import numpy as np
import pytest
from checkpoint_files import BF16, MIXTRAL, by_definition, mixtral, write_checkpoint
from support import assert_close
from test_cli import device, loaded, refused, saved  # noqa: F401 - device is a fixture

from cumoe.cli.main import main

pytest.importorskip("safetensors")


@pytest.fixture(params=["float32", "bfloat16"])
def arrays(request):
    dtype = np.float32 if request.param == "float32" else BF16
    return mixtral(np.random.default_rng(7), dtype)


@pytest.fixture
def checkpoint(tmp_path, arrays):
    return str(write_checkpoint(tmp_path / "checkpoint", MIXTRAL, arrays, 2))


def test_inspect_prints_a_line_a_layer(checkpoint, arrays, capsys):
    assert main(["inspect", checkpoint]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["family    mixtral", "layers    2 with experts"]
    assert lines[2].split() == ["layer", "hidden", "experts", "size", "top", "k", "shared", "dtype", "MiB"]
    dtype = next(iter(arrays.values())).dtype.name
    assert [line.split()[:7] for line in lines[3:]] == [[n, "40", "4", "24", "2", "-", dtype] for n in "02"]
    assert len({len(line) for line in lines[2:]}) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(12, 40), (2, 6, 40)])
def test_run_keeps_shape_and_dtype(device, checkpoint, arrays, tmp_path, capsys, dtype, shape):  # noqa: F811
    """Whatever the layer's own dtype; another one is said."""
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32 if dtype == "float32" else BF16)
    out = str(tmp_path / "y.npy")
    code = main(["run", checkpoint, "--layer", "2", "--device", device, "--input", saved(tmp_path, x), "--output", out])
    assert code == 0
    y = loaded(out, dtype)
    assert y.shape == shape
    own = next(iter(arrays.values())).dtype
    expected = by_definition(arrays, x.astype(own).reshape(-1, 40), 2)
    assert_close(y.reshape(-1, 40), expected, "bfloat16" if "bfloat16" in (dtype, own.name) else "float32")
    assert ("are converted" in capsys.readouterr().out) == (own.name != dtype)


def test_run_by_token_ids(tmp_path):
    """The hash layers of DeepSeek-V4; ids have the shape of the batch."""
    rng = np.random.default_rng(2)

    def normal(*shape):
        return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    block = "layers.0.ffn"
    arrays = {f"{block}.gate.weight": normal(4, 40), f"{block}.gate.tid2eid": rng.integers(0, 4, (9, 2))}
    for run in (*(f"experts.{e}" for e in range(4)), "shared_experts"):
        for name, shape in {"w1": (24, 40), "w2": (40, 24), "w3": (24, 40)}.items():
            arrays[f"{block}.{run}.{name}.weight"] = normal(*shape)
    config = {"model_type": "deepseek_v4", "num_experts_per_tok": 2}
    folder = str(write_checkpoint(tmp_path / "c", config, arrays))
    x, ids = normal(2, 3, 40), rng.integers(0, 9, (2, 3))
    arguments = ["run", folder, "--layer", "0", "--device", "cpu", "--input", saved(tmp_path, x)]
    out = tmp_path / "y.npy"
    assert main([*arguments, "--output", str(out), "--input-ids", saved(tmp_path, ids, "ids.npy")]) == 0
    once = np.load(out)
    assert main([*arguments, "--output", str(out), "--input-ids", saved(tmp_path, ids[::-1], "ids.npy")]) == 0
    assert main([*arguments, "--output", str(out)]) == 2
    assert once.shape == x.shape
    assert not np.array_equal(np.load(out), once)


def test_refusals_are_one_line(checkpoint, tmp_path, capsys):
    x, out = saved(tmp_path, np.zeros((3, 40), np.float32)), str(tmp_path / "y.npy")

    def run(*, path=checkpoint, layer="0", x=x, more=()):
        where = ("--input", x, "--output", out, "--device", "cpu")
        return refused(capsys, "run", path, "--layer", layer, *where, *more)

    assert "cumoe inspect: path: expected the folder" in refused(capsys, "inspect", str(tmp_path / "nowhere"))
    assert "cumoe run: path: expected the folder of a checkpoint" in run(path=str(tmp_path / "nowhere"))
    assert "layer: expected one of the layers with experts (0, 2), got 1" in run(layer="1")
    assert "x: expected shape (num_tokens=3, hidden_size=40), got (3, 8)" in run(
        x=saved(tmp_path, np.zeros((3, 8), "f"))
    )
    ids = saved(tmp_path, np.zeros(3), "ids.npy")
    assert f"--input-ids {ids}: expected whole numbers, got float64" in run(more=("--input-ids", ids))
    assert "--layer" in refused(capsys, "run", checkpoint)


def test_a_model_without_experts_is_refused(tmp_path, capsys):
    arrays = mixtral(np.random.default_rng(7), layers=())
    folder = str(write_checkpoint(tmp_path / "dense", MIXTRAL, arrays))
    assert "expected a layer with experts, got dense layers only" in refused(capsys, "inspect", folder)
