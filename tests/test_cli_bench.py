"""`cumoe bench`: lines and a file, what it refuses and what it skips; on a GPU one small layer."""

import csv
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from bench_problems import ROOFS, TINY, NumpySteps

from cumoe.bench import circumstances, roofs, timer
from cumoe.bench.baselines import BASELINES
from cumoe.bench.case import HEADER
from cumoe.bench.shapes import SHAPES
from cumoe.bench.timer import Times
from cumoe.cli import bench as bench_module
from cumoe.cli.main import main
from cumoe.cli.progress import say, with_progress

HOST_TITLES = ["first", "call", "out=", "residual", "replay", "moe()"]


class FakeTimer:
    """Runs once, and takes 100 us for it, others 200; of 7 tokens there are too many."""

    def times(self, run, replay="graph"):
        y = run()
        if y.shape[0] == 7:
            raise MemoryError
        assert np.isfinite(y.astype(np.float32)).all()
        assert 0.01 < y.astype(np.float32).std() < 10
        us = 100.0 if getattr(run, "__name__", "") in ("run", "<lambda>") and replay == "graph" else 200.0
        return Times(us, us - 1, us + 1)

    def us(self, run, replay="graph"):
        return self.times(run, replay).us


@pytest.fixture
def numpy_gpu(monkeypatch):
    """Let NumPy stand for CuPy on a GPU with 2 GiB free."""
    names = ("arange", "log", "sqrt", "cos", "empty", "empty_like", "asarray", "zeros", "full", "ones", "matmul")
    runtime = SimpleNamespace(
        memGetInfo=lambda: (2 << 30, 4 << 30), driverGetVersion=lambda: 13010, runtimeGetVersion=lambda: 12090
    )
    pool = SimpleNamespace(free_all_blocks=lambda: None)
    fake = SimpleNamespace(
        **{name: getattr(np, name) for name in (*names, "multiply")},
        asnumpy=np.asarray,
        __version__="14.2.0",
        cuda=SimpleNamespace(runtime=runtime, nvrtc=SimpleNamespace(getVersion=lambda: (12, 9))),
        get_default_memory_pool=lambda: pool,
    )
    for module in (bench_module, timer, roofs, circumstances):
        monkeypatch.setattr(module, "cupy", fake)
    monkeypatch.setattr(bench_module, "choose_machine", lambda _: (SimpleNamespace(name="some GPU"), ""))
    monkeypatch.setattr(bench_module, "Timer", FakeTimer)
    monkeypatch.setattr(bench_module, "measure_roofs", lambda *_: ROOFS)
    monkeypatch.setattr(bench_module, "clocks_now", lambda: {"sm": 1980})
    monkeypatch.setattr("cumoe.bench.cublas_loop.GpuSteps", lambda dtype: NumpySteps())
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
    ("array", "said"),
    [
        (np.zeros((3, 5)), "num"),
        (np.zeros((3, 3), np.int32), "top_k=2"),
        (np.full((3, 2), 8), "ids from 0 to 7"),
        (np.full((3, 2), -1), "ids from 0 to 7"),
        (np.zeros(3), "two dimensions"),
        (np.zeros((0, 8)), "two dimensions"),
        (np.zeros((3, 8), complex), "logits or ids"),
    ],
)
def test_files_that_do_not_fit(numpy_gpu, array, said, tmp_path, capsys):
    """They are refused before anything is measured."""
    path = tmp_path / "rows.npy"
    np.save(path, array)
    line = refused(capsys, "--layers", "tiny", "--routing", str(path))
    assert "--routing" in line
    assert said in line or "experts=8" in line


@pytest.mark.parametrize(
    ("name", "said"), [("zipf:x", "a number"), ("zipf:-1", "from 0"), ("zipf:nan", "from 0"), ("unifrm", "neither")]
)
def test_words_that_are_none(name, said, capsys):
    """The words that there are come with the refusal."""
    assert said in refused(capsys, "--routing", name)


def test_no_array(tmp_path, capsys):
    """Another file."""
    (tmp_path / "x.npy").write_text("hello")
    assert "saved by numpy.save" in refused(capsys, "--routing", str(tmp_path / "x.npy"))


def test_lines_and_file(numpy_gpu, tmp_path, capsys):
    """Versions, roofs, a line a case; what does not fit is skipped; the file holds the same."""
    path = tmp_path / "table.csv"
    arguments = ["--layers", "tiny", "Mixtral-8x7B", "--tokens", "1", "7", "33", "--csv", str(path)]
    arguments += ["--baselines", "replication", "cublas-loop", "--routing", "uniform", "one-hot"]
    assert main(["bench", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = ["device", "CUDA", "product", "copy", "read", "layers", "baselines"]
    assert [line.split()[0] for line in lines[:7]] == first
    assert lines[1].endswith("driver 13.1, runtime 12.9")
    assert "800 TFLOP/s" in lines[2]
    assert lines[7] == HEADER
    one, seven, many, hot, *_, mixtral = lines[8:]
    assert one.split()[:4] == ["tiny", "1", "2", "100.0"]
    assert one.split()[-3:] == ["100.0", "1.00x", "2.00x"]  # on the output, copies, loop
    assert many.split()[:4] == ["tiny", "33", "8", "100.0"]
    assert hot.split()[:4] == ["tiny", "1", "2", "100.0"]
    assert "skipped" in seven and "memory" in seven
    assert "skipped: its weights take 2.6 GiB, and 2.0 GiB are free" in mixtral
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["tokens"], row["routing"]) for row in rows] == [
        ("1", "uniform"), ("33", "uniform"), ("1", "one-hot"), ("33", "one-hot"),
    ]  # fmt: skip
    assert {(row["weight_on"], row["gpu"], row["nvrtc"], row["sm_mhz"]) for row in rows} == {
        ("input", "some GPU", "12.9", "1980")
    }
    assert {row["us_cublas_loop"] for row in rows} == {"200.0000"}
    assert {row["us_torch"] for row in rows} == {""}
    assert rows[0]["read_tb_per_s"] == "4.0000"


@pytest.mark.parametrize("installed", [True, False])
def test_progress(installed, monkeypatch, capsys):
    """Everything comes through, with tqdm or without; off a terminal there is no bar."""
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(with_progress([3, 1, 2], "case")) == [3, 1, 2]
    say("a line")
    captured = capsys.readouterr()
    assert captured.out == "a line\n"
    assert not captured.err


def test_a_baseline_without_memory_is_left_out(numpy_gpu, monkeypatch, capsys):
    """Torch has an exception of its own; any other error is one."""

    class OutOfMemoryError(RuntimeError):
        pass

    def failing(error):
        def prepare(_):
            raise error

        changed = BASELINES["cublas-loop"]._replace(prepare=prepare)
        monkeypatch.setitem(BASELINES, "cublas-loop", changed)

    arguments = ["bench", "--layers", "tiny", "--tokens", "1", "--baselines", "cublas-loop"]
    for error in (OutOfMemoryError(), MemoryError()):
        failing(error)
        assert main(arguments) == 0
        assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "100.0"
    failing(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layers", "gpt5"), ["gpt5", *SHAPES]),
        (("--tokens", "8", "0"), ["at least 1"]),
        (("--dtype", "float32"), ["float32", "bfloat16", "float16"]),
        (("--weight-on", "router"), ["router", "activation"]),
        (("--baselines", "vllm"), ["vllm", *BASELINES]),
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
    assert (
        refused(capsys, "--csv", str(path))
        == "cumoe bench: no CUDA device is there; python -m cumoe doctor tells what is missing\n"
    )
    assert not path.exists()


def test_a_file_that_cannot_be_written(numpy_gpu, tmp_path, capsys):
    """It is refused before anything is measured."""
    assert "--csv" in refused(capsys, "--csv", str(tmp_path / "missing" / "table.csv"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_small_layer_on_the_gpu(dtype, monkeypatch, tmp_path, capsys):
    """Measured times are positive, and a graph replay is what is timed."""
    try:
        import cupy.cublas  # noqa: F401
    except ImportError:
        pytest.skip("no cuBLAS")
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(roofs, "STREAM_BYTES", 1 << 28)
    path = tmp_path / "table.csv"
    options = ["--layers", "tiny", "--tokens", "1", "300", "--dtype", dtype, "--csv", str(path)]
    assert main(["bench", *options, "--routing", "uniform", "zipf:1"]) == 0
    assert "TFLOP/s" in capsys.readouterr().out
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["tokens"] for row in rows] == ["1", "300"] * 2
    times = ("us", "us_on_output", "ceiling_us", "us_replication", "us_cublas_loop")
    assert all(0 < float(row[name]) < 1e4 for row in rows for name in times)
    assert all(float(row["us_20"]) <= float(row["us"]) <= float(row["us_80"]) for row in rows)
    assert all(row["gpu"] and row["driver"] and int(row["sm_mhz"]) > 100 for row in rows)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tiny", "DeepSeek-V3"])  # the second has a router of its own
def test_stages_on_the_gpu(monkeypatch, tmp_path, capsys, name):
    """A line a stage, the layer last; stages compute what the layer computes, and the file holds those in a row."""
    import cupy

    from cumoe.bench.draw import Weights
    from cumoe.bench.stages import Stages

    monkeypatch.setitem(SHAPES, name, replace(TINY, num_experts=32, scoring="sigmoid"))
    path = tmp_path / "stages.csv"
    assert main(["bench", "--stages", "--layers", name, "--tokens", "3", "300", "--csv", str(path)]) == 0
    *_, header, nothing = capsys.readouterr().out.splitlines()[:4]
    assert header.split() == ["layer", "tokens", "stage", "cold", "warm"]
    assert nothing.split()[:3] == [name, "3", "nothing"]
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["tokens"], row["stage"]) for row in rows] == [
        (tokens, stage) for tokens in ("3", "300") for stage in ("router GEMM", "route + group", "experts", "combine")
    ]
    assert all(0 < float(row["warm_us"]) < 1e4 and 0 < float(row["us"]) < 1e4 for row in rows)
    stages = Stages(name, SHAPES[name], Weights(cupy, SHAPES[name], "bfloat16"), 5)
    runs = stages.runs()
    runs["layer"]()
    whole = cupy.asnumpy(stages.y).copy()
    stages.y.fill(np.nan)
    for stage in ("router GEMM", "route + group", "experts", "combine"):
        runs[stage]()
    assert cupy.asnumpy(stages.y).tobytes() == whole.tobytes()


@pytest.mark.gpu
def test_host_times_on_the_gpu(monkeypatch, capsys):
    """A line a batch; a replay is the least, and every later call less than the first."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    assert main(["bench", "--host", "--layers", "tiny", "--tokens", "1", "300"]) == 0
    device, layers, header, *lines = capsys.readouterr().out.splitlines()
    assert device.startswith("device") and layers.startswith("layers") and header.split()[2:] == HOST_TITLES
    assert [line.split()[:2] for line in lines] == [["tiny", "1"], ["tiny", "300"]]
    for line in lines:
        first, call, into_out, residual, replay, function = map(float, line.split()[2:])
        assert 0 < replay < min(call, into_out, residual) and max(call, into_out, residual) < min(first, function)
        assert call < 100  # 40 are wanted; a machine may be busy
