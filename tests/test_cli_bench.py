"""The benchmark: what it counts, what it refuses and what it skips; on a GPU one small layer."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from support import DTYPES, gpu_is_there

from cumoe.cli import bench as bench_module
from cumoe.cli.bench import CHUNK, draw_weights, fill
from cumoe.cli.main import main
from cumoe.cli.shapes import HEADER, NUM_TOKENS, SHAPES, Case, Roofs, Shape, case

TINY = Shape(64, 48, 8, 2, 2, 40, "input")
HOST_TITLES = ["first", "call", "out=", "residual", "replay", "moe()"]
ROOFS = Roofs(product=800e12, copy=4e12, read=4e12)


class FakeTimer:
    """Runs once, and takes 100 us for it; of 7 tokens there are too many."""

    def us(self, run, *, as_graph=True):
        y = run()
        assert np.isfinite(y.astype(np.float32)).all()
        assert 0.01 < y.astype(np.float32).std() < 10
        if y.shape[0] == 7:
            raise MemoryError
        return 100.0


@pytest.fixture
def numpy_gpu(monkeypatch):
    """Let NumPy stand for CuPy on a GPU with 2 GiB free."""
    names = ("arange", "log", "sqrt", "cos", "empty", "empty_like", "asarray")
    runtime = SimpleNamespace(
        memGetInfo=lambda: (2 << 30, 4 << 30), driverGetVersion=lambda: 13010, runtimeGetVersion=lambda: 12090
    )
    pool = SimpleNamespace(free_all_blocks=lambda: None)
    fake = SimpleNamespace(
        **{name: getattr(np, name) for name in names},
        asnumpy=np.asarray,
        cuda=SimpleNamespace(runtime=runtime),
        get_default_memory_pool=lambda: pool,
    )
    monkeypatch.setattr(bench_module, "cupy", fake)
    monkeypatch.setattr(bench_module, "choose_machine", lambda _: (SimpleNamespace(name="some GPU"), ""))
    monkeypatch.setattr(bench_module, "Timer", FakeTimer)
    monkeypatch.setattr(bench_module, "measure_roofs", lambda *_: ROOFS)
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def refused(capsys, *arguments):
    """Run the command, which must be refused; return the line that says why."""
    try:
        code = main(["bench", *arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("cumoe bench: ")
    return captured.err


@pytest.mark.parametrize(
    ("name", "billions"),  # of routed and shared weights: a layer's share of what the model is named after
    [
        ("Mixtral-8x7B", 1.409),
        ("Qwen3-30B-A3B", 0.604),
        ("DeepSeek-V3", 11.319),
        ("DeepSeek-V2-Lite", 0.571),
        ("Qwen2-57B-A14B", 1.982),
        ("Llama-4-Scout", 2.139),
        ("Llama-4-Maverick", 16.232),
    ],
)
def test_sizes_of_the_layers(name, billions):
    """The table has these layers, each with this many weights of 2 bytes."""
    shape = SHAPES[name]
    assert shape.weight_bytes(shape.num_experts) / 2e9 == pytest.approx(billions, abs=1e-3)
    assert (shape.weight_on == "input") == name.startswith("Llama-4")
    assert (shape.scoring == "softmax") == (not shape.shared_width)


def test_table():
    """Seven layers, six numbers of tokens."""
    assert len(SHAPES) == 7
    assert NUM_TOKENS == (1, 8, 64, 512, 4096, 16384)
    assert SHAPES["DeepSeek-V2-Lite"].shared_width == 2816
    assert SHAPES["Qwen2-57B-A14B"].shared_width == 20480


def test_counts():
    """Two operations a weight and token, two bytes a weight that is hit."""
    assert SHAPES["Mixtral-8x7B"].flops(3) == 6 * 3 * 4096 * 2 * 14336
    assert SHAPES["Mixtral-8x7B"].weight_bytes(5) == 6 * 4096 * 5 * 14336
    assert TINY.flops(10) == 6 * 10 * 64 * (2 * 48 + 2 * 40)
    assert TINY.weight_bytes(0) == 6 * 64 * 2 * 40


def test_drawn_weights_are_those_that_are_counted(monkeypatch):
    """Of routed and shared experts together."""
    monkeypatch.setattr(bench_module, "cupy", np)
    experts, shared = draw_weights(TINY, DTYPES["bfloat16"])
    runs = [experts.weights, *shared.weights]
    assert sum(each.w_gate_up.nbytes + each.w_down.nbytes for each in runs) == TINY.weight_bytes(TINY.num_experts)
    assert draw_weights(Shape(64, 48, 8, 2), DTYPES["float16"])[1] is None


def test_ceiling():
    """Whichever takes longer, computing or reading."""
    assert ROOFS.ceiling(800 * 10**6, 1) == pytest.approx(1)
    assert ROOFS.ceiling(1, 8 * 10**6) == pytest.approx(2)


@pytest.mark.parametrize("on_output", [None, 260.0])
def test_rows(on_output):
    """Rates follow from the time; a CSV row has a cell for each field."""
    shape = SHAPES["Mixtral-8x7B"]
    found = case("Mixtral-8x7B", shape, 1, ("bfloat16", "output"), 2, (250.0, on_output), ROOFS)
    assert found.tflops == pytest.approx(shape.flops(1) / 250e-6 / 1e12)
    assert found.tb_per_s == pytest.approx(shape.weight_bytes(2) / 250e-6 / 1e12)
    assert found.ceiling_us == pytest.approx(shape.weight_bytes(2) / 4e6)
    assert found.percent == pytest.approx(100 * found.ceiling_us / 250)
    cells = dict(zip(Case._fields, found.row(), strict=True))
    assert cells["layer"] == "Mixtral-8x7B"
    assert cells["tokens"] == "1"
    assert cells["experts_hit"] == "2"
    assert cells["us"] == "250.0000"
    assert cells["us_on_output"] == ("" if on_output is None else "260.0000")
    assert len(found.line()) == len(HEADER) - (11 if on_output is None else 0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_filled_numbers_are_normal(dtype):
    """Moments, no pattern along an axis, others in every chunk and with every seed; never zeros."""
    a = fill(np, np.empty((1 << 9, 1 << 9), DTYPES[dtype]), 1, 2.0).astype(np.float64).ravel()
    other = fill(np, np.empty(1 << 18, DTYPES[dtype]), 2, 2.0).astype(np.float64)
    assert abs(a.mean()) < 0.02
    assert abs(a.std() - 2) < 0.02
    assert abs(((a / 2) ** 4).mean() - 3) < 0.1
    assert (a == 0).mean() < 1e-3
    for shift in (1, 7, 512):
        assert abs(np.corrcoef(a[shift:], a[:-shift])[0, 1]) < 0.02
    assert abs(np.corrcoef(a, other)[0, 1]) < 0.02


def test_chunks_differ(monkeypatch):
    """The second chunk does not repeat the first, and the last may be short."""
    assert CHUNK * 4 * 4 <= 1 << 30  # four float32 or uint32 arrays at a time
    monkeypatch.setattr(bench_module, "CHUNK", 1 << 12)
    a = fill(np, np.empty((1 << 13) + 5, np.float32), 1, 1.0)
    assert abs(np.corrcoef(a[: 1 << 12], a[1 << 12 : 1 << 13])[0, 1]) < 0.1
    assert np.unique(a).size > 8000


def test_lines_and_file(numpy_gpu, tmp_path, capsys):
    """Versions, roofs, a line a case; what does not fit is skipped; the file holds the same."""
    path = tmp_path / "table.csv"
    arguments = ["--layers", "tiny", "Mixtral-8x7B", "--tokens", "1", "7", "33", "--csv", str(path)]
    assert main(["bench", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["device", "CUDA", "product", "copy", "read", "layers"]
    assert lines[1].endswith("driver 13.1, runtime 12.9")
    assert "800 TFLOP/s" in lines[2]
    assert lines[6] == HEADER
    one, seven, many, mixtral = lines[7:]
    assert one.split()[:4] == ["tiny", "1", "2", "100.0"]
    assert one.split()[-1] == "100.0"  # with weights on the output
    assert many.split()[:4] == ["tiny", "33", "8", "100.0"]
    assert "skipped" in seven and "memory" in seven
    assert "skipped: its weights take 2.6 GiB, and 2.0 GiB are free" in mixtral
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["tokens"], row["weight_on"]) for row in rows] == [("1", "input"), ("33", "input")]


@pytest.mark.parametrize("weight_on", ["input", "activation", "output"])
def test_weight_on_and_dtype(numpy_gpu, weight_on, tmp_path):
    """Both options reach the file; only weights on the input are compared with the output."""
    path = tmp_path / "table.csv"
    chosen = ["--layers", "tiny", "--tokens", "5", "--weight-on", weight_on, "--dtype", "float16", "--csv", str(path)]
    assert main(["bench", *chosen]) == 0
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["weight_on"], row["dtype"]) == (weight_on, "float16")
    assert bool(row["us_on_output"]) == (weight_on == "input")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layers", "gpt5"), ["gpt5", *SHAPES]),
        (("--tokens", "8", "0"), ["at least 1"]),
        (("--dtype", "float32"), ["float32", "bfloat16", "float16"]),
        (("--weight-on", "router"), ["router", "activation"]),
    ],
)
def test_refusals(arguments, said, capsys):
    """One line that names what is wrong and what there is."""
    line = refused(capsys, *arguments)
    assert all(word in line for word in said)


def test_no_gpu(monkeypatch, tmp_path, capsys):
    """There is nothing to time, and no file is touched."""
    monkeypatch.setattr("cumoe.cli.machine.gpu_is_there", lambda: False)
    path = tmp_path / "table.csv"
    assert refused(capsys, "--csv", str(path)) == "cumoe bench: no CUDA device is there\n"
    assert not path.exists()


def test_a_file_that_cannot_be_written(numpy_gpu, tmp_path, capsys):
    """It is refused before anything is measured."""
    assert "--csv" in refused(capsys, "--csv", str(tmp_path / "missing" / "table.csv"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_small_layer_on_the_gpu(dtype, monkeypatch, tmp_path, capsys):
    """Measured times are positive, and a graph replay is what is timed."""
    if not gpu_is_there():
        pytest.skip("no CUDA device")
    try:
        import cupy.cublas  # noqa: F401
    except ImportError:
        pytest.skip("no cuBLAS")
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(bench_module, "STREAM_BYTES", 1 << 28)
    path = tmp_path / "table.csv"
    options = ["--layers", "tiny", "--tokens", "1", "300", "--dtype", dtype, "--csv", str(path)]
    assert main(["bench", *options]) == 0
    assert "TFLOP/s" in capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["tokens"] for row in rows] == ["1", "300"]
    assert all(0 < float(row[name]) < 1e4 for row in rows for name in ("us", "us_on_output", "ceiling_us"))


@pytest.mark.gpu
def test_host_times_on_the_gpu(monkeypatch, capsys):
    """A line a batch; a replay is the least, and every later call less than the first."""
    if not gpu_is_there():
        pytest.skip("no CUDA device")
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    assert main(["bench", "--host", "--layers", "tiny", "--tokens", "1", "300"]) == 0
    device, layers, header, *lines = capsys.readouterr().out.splitlines()
    assert device.startswith("device") and layers.startswith("layers") and header.split()[2:] == HOST_TITLES
    assert [line.split()[:2] for line in lines] == [["tiny", "1"], ["tiny", "300"]]
    for line in lines:
        first, call, into_out, residual, replay, function = map(float, line.split()[2:])
        assert 0 < replay < min(call, into_out, residual) and max(call, into_out, residual) < min(first, function)
        assert call < 100  # 40 are wanted; a machine may be busy
