"""The command line: every family, files in and out, and refusals in one line."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import DTYPES, assert_close, gpu_is_there, random_layer

import cumoe
from cumoe.bench.replication import replicate
from cumoe.cli import demo as demo_module
from cumoe.cli.families import FAMILIES
from cumoe.cli.layer import CHUNK, draw, draw_layer
from cumoe.cli.machine import Cpu, choose_machine
from cumoe.cli.main import main
from cumoe.cli.measure import Measurement, measure, relative_difference

HIDDEN = 48


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """Return the device that is asked for."""
    if request.param == "gpu" and not gpu_is_there():
        pytest.skip("no CUDA device")
    return request.param


def states(dtype, *shape, seed=0):
    """Return hidden states of deviation 1."""
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def saved(folder, array, name="x.npy"):
    """Return the path of a file that holds the array."""
    np.save(folder / name, array)
    return str(folder / name)


def loaded(path, dtype):
    """Return the array of a file; bfloat16 is 2 untyped bytes there."""
    array = np.load(path)
    assert array.dtype.str[1:] == {"float32": "f4", "float16": "f2", "bfloat16": "V2"}[dtype]
    return array.view(DTYPES[dtype])


def refused(capsys, *arguments):
    """Run a command that must be refused; return the line that says why."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("cumoe")
    return captured.err


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(device, family, tmp_path, capsys):
    """Right by its own account."""
    path = saved(tmp_path, states("float32", 20, HIDDEN))
    assert main(["demo", "--device", device, "--family", family, "--input", path]) == 0
    printed = capsys.readouterr().out
    assert "verdict" in printed
    assert "WRONG" not in printed
    assert ("replication" in printed) == (family == "llama4")


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_and_random_tokens(top_k, capsys):
    """The tokens of the replication are counted as they are copied."""
    assert main(["demo", "--device", "cpu", "--tokens", "10", "--top-k", str(top_k)]) == 0
    assert f"(10, 384) -> ({10 * (top_k + 1)}, 384)" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(12, HIDDEN), (2, 6, HIDDEN), (0, HIDDEN)])
def test_files_keep_shape_and_dtype(device, dtype, shape, tmp_path):
    """The result is that of the definition, in the shape and dtype of the input."""
    x = states(dtype, *shape)
    paths = saved(tmp_path, x), str(tmp_path / "no_suffix")
    assert main(["demo", "--device", device, "--input", paths[0], "--output", paths[1], "--seed", "3"]) == 0
    y = loaded(paths[1], dtype)
    assert y.shape == shape
    tokens = x.reshape(-1, HIDDEN)
    family = FAMILIES["llama4"].fitted(HIDDEN, 10**9)
    layer = draw_layer(np, 3, family, DTYPES[dtype])
    expected = cumoe.reference.moe(
        tokens, layer.route(tokens, np), layer.routed, layer.shared_experts, weight_on="input"
    )
    assert_close(y.reshape(-1, HIDDEN), expected, dtype)


def test_the_seed_decides(tmp_path):
    """The same numbers every time, others with another seed."""
    results = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        path = tmp_path / name
        assert main(["demo", "--device", "cpu", "--tokens", "9", "--seed", seed, "--output", str(path)]) == 0
        results[name] = path.read_bytes()
    assert results["a"] == results["b"] != results["c"]


def test_tokens_that_are_not_finite_are_left_out(tmp_path, capsys):
    """NaN in, NaN out, and the other rows are still compared."""
    x = states("float32", 8, HIDDEN)
    x[2, 3], x[5] = np.nan, np.inf
    path, out = saved(tmp_path, x), str(tmp_path / "y.npy")
    assert main(["demo", "--device", "cpu", "--input", path, "--output", out]) == 0
    y = np.load(out)
    assert (np.isfinite(y).all(1) == [True, True, False, True, True, False, True, True]).all()


def test_config(capsys):
    """Versions and devices."""
    assert main(["config"]) == 0
    assert f": {cumoe.__version__}\n" in capsys.readouterr().out


def test_version_and_help(capsys):
    """Both end with 0."""
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit) as stop:
            main([option])
        assert stop.value.code == 0
    assert f"cumoe {cumoe.__version__}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "required"),
        (("demonstrate",), "demonstrate"),
        (("demo", "--family", "gpt5"), "gpt5"),
        (("demo", "--dtype", "float8"), "float8"),
        (("demo", "--tokens", "0"), "at least 1"),
        (("demo", "--tokens", "many"), "many"),
        (("demo", "--seed", "x"), "--seed"),
        (("demo", "--top-k", "17"), "from 1 to 16"),
        (("demo", "--family", "deepseek_v3", "--top-k", "200"), "at most 128"),
        (("demo", "--input", "missing.npy"), "No such file"),
        (("demo", "--input", "."), "directory"),
        (("demo", "--output", "missing/y.npy"), "existing folder"),
        (("demo", "--output", "."), "existing folder"),
        (("demo", "--input", "x.npy", "--tokens", "3"), "the file decides"),
        (("demo", "--input", "x.npy", "--dtype", "float16"), "the file decides"),
        (("demo", "surplus"), "surplus"),
    ],
)
def test_refusals(arguments, said, tmp_path, monkeypatch, capsys):
    """One line on stderr that names what is wrong, and exit code 2."""
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(5, np.float32), "(5,)"),
        (np.zeros((1, 2, 3, 4), np.float32), "(1, 2, 3, 4)"),
        (np.zeros((5, 0), np.float32), "(5, 0)"),
        (np.float32(1), "()"),
        (np.zeros((2, 8)), "float64"),
        (np.zeros((2, 8), np.int16), "int16"),
        (np.zeros((2, 8), ">f4"), ">f4"),
        (np.zeros((2, 8), "V4"), "V4"),
        (np.zeros((2, 8), "f4,f4"), "f4"),
    ],
    ids=str,
)
def test_files_that_hold_no_hidden_states(array, said, tmp_path, capsys):
    """Rank and dtype are named."""
    assert said in refused(capsys, "demo", "--input", saved(tmp_path, array))


def test_files_that_hold_no_array(tmp_path, capsys):
    """Text, an empty file, an archive, objects, half an array."""
    np.savez(tmp_path / "archive.npz", x=np.zeros((2, 8), np.float32))
    np.save(tmp_path / "objects.npy", np.array([["words"]], object), allow_pickle=True)
    whole = (tmp_path / "archive.npz").read_bytes()
    np.save(tmp_path / "half.npy", np.zeros((100, 8), np.float32))
    (tmp_path / "half.npy").write_bytes((tmp_path / "half.npy").read_bytes()[:400])
    (tmp_path / "text.npy").write_text("hidden states")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "garbage.npy").write_bytes(whole[:3] + b"\x93NUMPY")
    for path in sorted(tmp_path.iterdir()):
        assert "numpy.save" in refused(capsys, "demo", "--input", str(path))


def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    """Asked for it is a refusal; hoped for it is a note, and the CPU."""
    monkeypatch.setattr("cumoe.cli.machine.gpu_is_there", lambda: False)
    assert "no CUDA device" in refused(capsys, "demo", "--device", "gpu")
    assert isinstance(choose_machine("auto")[0], Cpu)


def test_kernels_that_do_not_compile(monkeypatch, capsys):
    """The reason is given, in one line."""

    def unusable(name):
        raise RuntimeError(f"no kernel\n{name}")

    monkeypatch.setattr("cumoe.cli.machine.gpu_is_there", lambda: True)
    monkeypatch.setattr("cumoe.cli.machine.kernel", unusable)
    assert "no kernel group_place" in refused(capsys, "demo", "--device", "gpu")
    assert choose_machine("auto")[1] == "no kernel group_place"


def test_too_little_memory_is_a_refusal(monkeypatch, capsys):
    """Not a traceback."""

    def full(*_):
        raise MemoryError("out of it")

    monkeypatch.setattr(demo_module, "draw_layer", full)
    assert "out of it" in refused(capsys, "demo", "--device", "cpu", "--tokens", "7")


def test_a_wrong_result_is_called_wrong(monkeypatch, capsys):
    """The verdict can fall the other way, with exit code 1."""
    monkeypatch.setattr(demo_module, "replicate", lambda x, *_: 0 * x)
    assert main(["demo", "--device", "cpu", "--tokens", "4"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_replication_computes_the_same_layer(backend, dtype, top_k):
    """With the shared expert as one more of the stack."""
    layer = random_layer(
        np.random.default_rng(top_k), dtype, num_tokens=21, top_k=top_k, shared_sizes=(24,), weight_on="input"
    )
    x, routing, _, _ = layer.build(backend)
    (shared,) = layer.shared
    stacked = {
        name: backend.asarray(np.concatenate([layer.experts[name], shared[name][None]]))
        for name in ("w_gate_up", "w_down")
    }
    xp = np if backend.name == "cpu" else pytest.importorskip("cupy")
    y = backend.asnumpy(replicate(x, routing, cumoe.Experts(**stacked), xp))
    assert y.dtype == DTYPES[dtype]
    assert relative_difference(y, layer.expected()) < {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 8192), st.integers(0, 10**10))
def test_fitted_layers_can_be_routed(name, hidden_size, max_weights):
    """Whatever is cut away, the router still fits, and the limit is kept while anything is left to cut."""
    family = FAMILIES[name].fitted(hidden_size, max_weights)
    family.router().check_experts(family.num_experts, name)
    assert family.hidden_size == hidden_size
    assert family.intermediate_size >= 8
    assert bool(family.shared_size) == bool(FAMILIES[name].shared_size)
    assert family.is_replicable == FAMILIES[name].is_replicable
    assert family.num_weights <= max_weights or (family.intermediate_size == 8 and not family.can_halve_experts)


def test_families_keep_their_sizes_where_there_is_room():
    """At its own width a layer is the published one."""
    for family in FAMILIES.values():
        assert family.fitted(family.hidden_size, 10**12) == family


def test_drawn_numbers():
    """Deviation and mean as asked for, no pattern along an axis, the same on both sides of a chunk's border."""
    numbers = draw(np, "a", (512, 256), 2.0, np.float32)
    assert abs(numbers.mean()) < 0.03
    assert abs(numbers.std() - 2) < 0.03
    for shift in (1, 7, 256):
        assert abs(np.corrcoef(numbers.ravel()[shift:], numbers.ravel()[:-shift])[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers.ravel(), draw(np, "b", (512, 256), 2.0, np.float32).ravel())[0, 1]) < 0.02
    longer = draw(np, "a", (CHUNK + 3,), 2.0, np.float32)
    assert (longer[: numbers.size] == numbers.ravel()).all()
    assert len(set(longer[-4:])) == 4


@pytest.mark.gpu
def test_drawn_numbers_are_the_same_on_the_gpu():
    """Bit for bit."""
    if not gpu_is_there():
        pytest.skip("no CUDA device")
    import cupy

    for dtype in DTYPES.values():
        ours = draw(cupy, "a", (33, 65), 0.3, dtype)
        assert cupy.asnumpy(ours).tobytes() == draw(np, "a", (33, 65), 0.3, dtype).tobytes()


def test_measurements():
    """Both candidates run equally often, time is a median, memory is what a run holds at its peak."""
    calls = {"small": 0, "large": 0}

    def candidate(name, size):
        def run():
            calls[name] += 1
            return np.ones(size, np.uint8)[:4]

        return run

    candidates = {"small": candidate("small", 1 << 16), "large": candidate("large", 1 << 22)}
    taken = measure(candidates, Cpu())
    assert calls["small"] == calls["large"] >= 6
    assert all(isinstance(each, Measurement) and each.seconds > 0 for each in taken.values())
    assert 1 << 22 <= taken["large"].peak_bytes < (1 << 22) + 100_000
    assert 1 << 16 <= taken["small"].peak_bytes < (1 << 16) + 100_000
