"""The benchmark: what it counts, what it refuses and what it skips; on a GPU one small layer."""

import csv
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import BF16, DTYPES

import cumoe
from cumoe.bench import circumstances, draw, roofs, timer
from cumoe.bench.baselines import BASELINES, run_of
from cumoe.bench.case import HEADER, Case, Measured, case_of
from cumoe.bench.cublas_loop import CublasLoop
from cumoe.bench.distributions import Distribution
from cumoe.bench.draw import CHUNK, Weights, fill
from cumoe.bench.problem import Problem
from cumoe.bench.roofs import Roofs
from cumoe.bench.shapes import NUM_TOKENS, SHAPES, Shape
from cumoe.bench.timer import Times, times_of
from cumoe.bench.torch_grouped import TorchGrouped
from cumoe.cli import bench as bench_module
from cumoe.cli.main import main
from cumoe.cli.progress import say, with_progress

TINY = Shape(64, 48, 8, 2, 1, 48, "input", "sigmoid")
HOST_TITLES = ["first", "call", "out=", "residual", "replay", "moe()"]
ROOFS = Roofs(product=800e12, copy=4e12, read=4e12)
TINY_SHAPES = {
    "input": TINY,
    "shared": Shape(64, 48, 8, 2, 2, 40),
    "gate": Shape(64, 48, 8, 2, 1, 96, shared_gate=True),
    "ungated": Shape(64, 48, 8, 2, 1, 40, activation="relu2", layout="ungated"),
    "biases": Shape(64, 48, 8, 2, activation="gpt_oss", layout="interleaved", biases=True),
}


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


class NumpySteps:
    """What the kernels of the loop compute."""

    def gather(self, x, tokens, scales):
        rows = x[tokens].astype(np.float32)
        return (rows if scales is None else rows * scales[:, None]).astype(x.dtype)

    def activate(self, hidden, activation):
        values = hidden.astype(np.float32)
        if activation == "relu2":
            return (np.maximum(values, 0) ** 2).astype(hidden.dtype)
        gate, up = np.split(values, 2, axis=1)
        return (gate / (1 + np.exp(-gate)) * up).astype(hidden.dtype)

    def add(self, total, rows, tokens, scales):
        rows = rows.astype(np.float32)
        total[tokens] += rows if scales is None else rows * scales[:, None]


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


def problem_of(shape, num_tokens=33, dtype=BF16, routing="uniform", weight_on=None):
    weights = Weights(np, shape, dtype)
    return Problem(np, shape, weights, num_tokens, weight_on or shape.weight_on, Distribution(routing))


def exact(problem):
    """Return what the problem is by definition."""
    weights = problem.weights
    return cumoe.reference.moe(problem.x, problem.routing, weights.experts, weights.shared, weight_on=problem.weight_on)


def difference(y, expected):
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)


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
        ("Qwen3-Next-80B", 1.614),
        ("DeepSeek-V3", 11.319),
        ("DeepSeek-V2-Lite", 0.571),
        ("Qwen2-57B-A14B", 1.982),
        ("Llama-4-Scout", 2.139),
        ("Llama-4-Maverick", 16.232),
        ("gpt-oss-120b", 3.185),
        ("GLM-4.5-Air", 2.232),
        ("Nemotron-3-Nano", 1.297),
    ],
)
def test_sizes_of_the_layers(name, billions):
    """The table has these layers, each with this many weights of 2 bytes."""
    shape = SHAPES[name]
    assert shape.weight_bytes(shape.num_experts) / 2e9 == pytest.approx(billions, abs=1e-3)
    assert (shape.weight_on == "input") == name.startswith("Llama-4") == shape.is_replicable


def test_table():
    """Eleven layers, six numbers of tokens, what is particular about some."""
    assert len(SHAPES) == 11
    assert NUM_TOKENS == (1, 8, 64, 512, 4096, 16384)
    assert SHAPES["DeepSeek-V2-Lite"].shared_width == 2816
    assert SHAPES["Qwen2-57B-A14B"].shared_width == 20480
    assert [name for name, shape in SHAPES.items() if shape.shared_gate] == ["Qwen3-Next-80B", "Qwen2-57B-A14B"]
    assert SHAPES["Nemotron-3-Nano"].num_matrices == 2


def test_counts():
    """Two operations a weight and token, two bytes a weight that is hit."""
    assert SHAPES["Mixtral-8x7B"].flops(3) == 6 * 3 * 4096 * 2 * 14336
    assert SHAPES["Mixtral-8x7B"].weight_bytes(5) == 6 * 4096 * 5 * 14336
    shared, ungated = TINY_SHAPES["shared"], TINY_SHAPES["ungated"]
    assert shared.flops(10) == 6 * 10 * 64 * (2 * 48 + 2 * 40)
    assert shared.weight_bytes(0) == 6 * 64 * 2 * 40
    assert ungated.flops(1) == 4 * 64 * (2 * 48 + 40)


@pytest.mark.parametrize("name", TINY_SHAPES)
def test_drawn_weights_are_those_that_are_counted(name):
    """Of routed and shared experts together."""
    shape = TINY_SHAPES[name]
    weights = Weights(np, shape, BF16)
    runs = [weights.experts.weights, *(weights.shared.weights if weights.shared else ())]
    assert sum(each.w_gate_up.nbytes + each.w_down.nbytes for each in runs) == shape.weight_bytes(shape.num_experts)
    assert (weights.shared is None) == (not shape.shared_width)
    assert (weights.stacked is not None) == shape.is_replicable
    assert weights.shared is None or (weights.shared.gate is not None) == shape.shared_gate
    assert (weights.experts.weights.b_down is not None) == shape.biases


def test_ceiling():
    """Whichever takes longer, computing or reading."""
    assert ROOFS.ceiling(800 * 10**6, 1) == pytest.approx(1)
    assert ROOFS.ceiling(1, 8 * 10**6) == pytest.approx(2)
    assert ROOFS.binding(800 * 10**6, 1) == "product"
    assert ROOFS.binding(1, 8 * 10**6) == "read"


def test_quantiles():
    """Of twenty runs the fifth from either end, about."""
    assert times_of([float(i) for i in range(19, -1, -1)]) == Times(9.5, 4.0, 15.0)
    assert times_of([3.0]) == Times(3.0, 3.0, 3.0)


@pytest.mark.parametrize("on_output", [None, 260.0])
def test_rows(on_output):
    """Rates follow from the time; a CSV row has a cell for each field, in the order that it always had."""
    problem, shape = problem_of(TINY, 1), TINY
    measured = Measured(Times(250.0, 240.0, 255.0), on_output, {"torch": 500.0, "replication": None}, {"sm": 1755})
    found = case_of("tiny", problem, measured, ROOFS, "uniform")
    assert found.tflops == pytest.approx(shape.flops(1) / 250e-6 / 1e12)
    assert found.tb_per_s == pytest.approx(shape.weight_bytes(2) / 250e-6 / 1e12)
    assert found.ceiling_us == pytest.approx(shape.weight_bytes(2) / 4e6)
    assert found.percent == pytest.approx(100 * found.ceiling_us / 250)
    assert Case._fields[:11] == (
        "layer", "tokens", "dtype", "weight_on", "experts_hit", "us", "tflops", "tb_per_s", "ceiling_us", "percent",
        "us_on_output",
    )  # fmt: skip
    cells = dict(zip(Case._fields, found.row(), strict=True))
    wanted = {
        "layer": "tiny", "tokens": "1", "experts_hit": "2", "us": "250.0000", "us_20": "240.0000",
        "us_on_output": "" if on_output is None else "260.0000", "binds": "read", "routing": "uniform",
        "most_tokens": "1", "balancedness": "0.2500", "us_torch": "500.0000", "us_replication": "",
        "us_cublas_loop": "", "sm_mhz": "1755", "memory_mhz": "",
    }  # fmt: skip
    assert {name: cells[name] for name in wanted} == wanted
    assert found.line().endswith("2.00x")
    assert len(found.line()) == len(HEADER)


@pytest.mark.parametrize("name", TINY_SHAPES)
@pytest.mark.parametrize("weight_on", ["input", "activation", "output"])
def test_baselines_compute_the_same(name, weight_on):
    """Each that says it can; with CuPy's kernels written out in NumPy."""
    problem = problem_of(TINY_SHAPES[name], 33, weight_on=weight_on)
    expected = exact(problem)
    assert difference(problem.run(), expected) < 5e-3
    served = {baseline: BASELINES[baseline].serves(problem) for baseline in BASELINES}
    assert served["replication"] == (name == "input" and weight_on == "input")
    assert served["cublas-loop"] == (name not in ("gate", "biases") and weight_on != "activation")
    if served["replication"]:
        run, _ = run_of("replication", problem)
        assert difference(run(), expected) < 2e-2
    if served["cublas-loop"]:
        assert difference(CublasLoop(problem, NumpySteps()).run(), expected) < 2e-2


@pytest.mark.parametrize("name", TINY_SHAPES)
@pytest.mark.parametrize("routing", ["uniform", "one-hot"])
def test_torch_computes_the_same(name, routing):
    """Also with experts that nobody goes to."""
    torch = pytest.importorskip("torch")
    problem = problem_of(TINY_SHAPES[name], 20, routing=routing)
    assert TorchGrouped.serves(problem) == (name != "biases")
    if name == "biases":
        assert run_of("torch", problem) is None
        return
    run, replay = run_of("torch", problem)
    assert replay == "torch graph"
    y = run()
    assert y.dtype == torch.bfloat16
    assert difference(y.float().numpy(), exact(problem)) < 2e-2


@pytest.mark.parametrize("name", ["uniform", "balanced", "zipf:0", "zipf:1.2", "zipf", "one-hot"])
def test_distributions(name):
    """Distinct experts a token, the same every time, as uneven as the word says."""
    shape = Shape(8, 8, 16, 3)
    first, again = (Distribution(name).routing(np, shape, 2000) for _ in range(2))
    assert (first.topk_ids == again.topk_ids).all()
    assert all(len(set(row)) == 3 for row in first.topk_ids.tolist())
    counts = np.bincount(first.topk_ids.ravel(), minlength=16)
    if name == "balanced":
        assert counts.max() - counts.min() <= 1
    elif name == "one-hot":
        assert counts[0] == 2000 and counts[1:].max() < 400
    elif name in ("uniform", "zipf:0"):
        assert counts.min() > 300 and counts.max() < 450
    else:
        assert counts[0] > 2 * counts[4] > 2 * counts[-1]


def test_zipf_is_a_draw_without_replacement():
    """With one expert a token, an expert's share is its chance."""
    routing = Distribution("zipf:1").routing(np, Shape(8, 8, 4, 1), 40_000)
    shares = np.bincount(routing.topk_ids.ravel(), minlength=4) / 40_000
    chances = 1 / np.arange(1, 5)
    assert np.abs(shares - chances / chances.sum()).max() < 0.01


def test_routing_from_a_file(tmp_path):
    """Ids or logits, repeated as often as tokens are wanted."""
    shape, path = Shape(8, 8, 4, 2), tmp_path / "rows.npy"
    np.save(path, np.array([[0, 1], [2, 3], [1, 0]]))
    found = Distribution(str(path))
    found.check(shape)
    assert found.routing(np, shape, 5).topk_ids.tolist() == [[0, 1], [2, 3], [1, 0], [0, 1], [2, 3]]
    logits = np.random.default_rng(0).standard_normal((3, 4))
    np.save(path, logits)
    found = Distribution(str(path))
    found.check(shape)
    assert found.routing(np, shape, 2).topk_ids.tolist() == (-logits).argsort(1)[:2, :2].tolist()


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


@given(st.integers(0, 40), st.sampled_from(["uniform", "balanced", "zipf:2", "one-hot"]))
def test_few_tokens(num_tokens, name):
    """Any number of tokens can be routed."""
    routing = Distribution(name).routing(np, Shape(8, 8, 16, 3), num_tokens)
    assert routing.topk_ids.shape == routing.topk_weights.shape == (num_tokens, 3)


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
    monkeypatch.setattr(draw, "CHUNK", 1 << 12)
    a = fill(np, np.empty((1 << 13) + 5, np.float32), 1, 1.0)
    assert abs(np.corrcoef(a[: 1 << 12], a[1 << 12 : 1 << 13])[0, 1]) < 0.1
    assert np.unique(a).size > 8000


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
@pytest.mark.parametrize("name", TINY_SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_baselines_compute_the_same_on_the_gpu(name, dtype):
    """The kernels of the loop, cuBLAS, torch."""
    cupy = pytest.importorskip("cupy")
    try:
        import cupy.cublas
    except ImportError:
        pytest.skip("no cuBLAS")
    shape = TINY_SHAPES[name]
    weights = Weights(cupy, shape, DTYPES[dtype])
    problem = Problem(cupy, shape, weights, 33, shape.weight_on, Distribution("uniform"))
    expected = cupy.asnumpy(problem.run()).astype(np.float64)
    timed = timer.Timer()
    for baseline in BASELINES:
        found = run_of(baseline, problem)
        if found is not None:
            run, replay = found
            y = run()
            y = y.float().cpu().numpy() if replay == "torch graph" else cupy.asnumpy(y)
            assert difference(y, expected) < 2e-2, baseline
            assert 0 < timed.us(run, replay) < 1e4


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
