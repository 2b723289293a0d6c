"""The pictures: made from what the benchmark saves, nothing cut, no text over another, in both themes."""

import csv
import importlib.util
import json
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cumoe.bench.case import Case, Measured, case_of
from cumoe.bench.distributions import Distribution
from cumoe.bench.roofs import Roofs
from cumoe.bench.shapes import NUM_TOKENS, SHAPES
from cumoe.bench.timer import Times
from cumoe.cli.main import main
from cumoe.cli.plot import DRAWN, FROM_FILES, KINDS
from cumoe.plot import load, models, timeline
from cumoe.plot.style import THEMES
from cumoe.plot.table import read_rows
from cumoe.plot.timeline import cases_of, trace

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / ".ci" / "figures"
ROOFS = Roofs(785e12, 4.3e12, 4.51e12)
AROUND = {
    "gpu": "NVIDIA H200, compute capability 90", "driver": "580.159", "product_tflops": "785", "read_tb_per_s": "4.51",
    "utc": "2026-11-25 12:00:00",
}  # fmt: skip


def cases(layers, num_tokens, routings=("uniform",)):
    """Yield what the benchmark would say if it reached a random part of the ceiling."""
    rng = np.random.default_rng(0)
    for layer in layers:
        shape = SHAPES[layer]
        for name in routings:
            for tokens in num_tokens:
                ids = Distribution(name).routing(np, shape, tokens).topk_ids
                counts = np.bincount(ids.ravel(), minlength=shape.num_experts)
                hit = int((counts > 0).sum())
                ceiling = ROOFS.ceiling(shape.flops(tokens), shape.weight_bytes(hit))
                us = ceiling / rng.uniform(0.3, 0.99)
                problem = SimpleNamespace(
                    shape=shape, num_tokens=tokens, experts_hit=hit, x=SimpleNamespace(dtype=np.dtype(np.float16)),
                    weight_on=shape.weight_on, tokens_per_expert=counts, balancedness=counts.mean() / counts.max(),
                )  # fmt: skip
                others = {
                    "replication": us * 1.4 if shape.is_replicable else None,
                    "cublas-loop": max(us * rng.uniform(0.9, 8), ceiling),
                    "torch": max(us * rng.uniform(0.7, 2), ceiling),
                }
                yield case_of(layer, problem, Measured(Times(us, us, us), None, others, {"sm": 1755}), ROOFS, name)


def write(path, found):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Case._fields, *AROUND])
        writer.writerows([*case.row(), *AROUND.values()] for case in found)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a file for each kind that is drawn from one."""
    folder = tmp_path_factory.mktemp("csv")
    bench = write(folder / "bench.csv", cases(SHAPES, NUM_TOKENS[:5]))
    routings = ["balanced", "uniform", "zipf:0.5", "zipf:1.5", "one-hot"]
    uneven = write(folder / "imbalance.csv", cases(["Mixtral-8x7B", "DeepSeek-V3"], [64, 4096], routings))
    stages = folder / "stages.csv"
    rows = [("route", 12.5, 40), ("group", 6, ""), ("gate/up", 2653, 91), ("down", 1330, 88), ("combine", 60.4, 80)]
    lines = [f"{layer},{t},{s},{us / n},{p}" for layer, t, n in CASES for s, us, p in rows]
    stages.write_text("\n".join(["layer,tokens,stage,us,percent", *lines]) + "\n")
    return {"models": bench, "roofline": bench, "imbalance": uneven, "timeline": stages}


CASES = (("Mixtral-8x7B", 4096, 1), ("Qwen3-30B-A3B", 1, 30))


def figure_of(kind, files, theme):
    if kind in FROM_FILES:
        draw, columns = FROM_FILES[kind]
        return draw(read_rows([files[kind]], columns), theme)
    if kind in DRAWN:
        return DRAWN[kind](theme)
    shape = SHAPES["DeepSeek-V3"]
    routings = {n: Distribution(n).routing(np, shape, 4096) for n in ("balanced", "uniform", "zipf:1", "one-hot")}
    return load.load({n: np.bincount(r.topk_ids.ravel(), minlength=256) for n, r in routings.items()}, theme, "a layer")


def undrawn(axis):
    """Return the labels of ticks beyond the limits of an axis."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    outside = [tick for tick in ticks if not low - slack <= tick.get_loc() <= high + slack]
    return [label for tick in outside for label in (tick.label1, tick.label2)]


def texts_of(figure):
    """Return (text, box) of everything written, in pixels."""
    from matplotlib.text import Text

    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    beyond = {id(label) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in undrawn(axis)}
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in beyond]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in found if t.axes is None or t.axes.get_visible()]
    return [(text, box) for text, box in boxes if box.width and box.height]


def nothing_is_cut_or_overlaps(figure):
    """Assert that every box of text is inside the figure, and meets no other by more than a pixel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    texts = texts_of(figure)
    assert len(texts) > 5
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in texts:
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, f"cut: {text!r}"
    for (one, a), (other, b) in combinations(texts, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        down = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across < 1 or down < 1, f"{one!r} lies over {other!r}"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_cut_and_no_text_lies_over_another(kind, files):
    """Every box of text is inside the figure, and meets no other by more than a pixel."""
    pytest.importorskip("matplotlib")
    nothing_is_cut_or_overlaps(figure_of(kind, files, THEMES["light"]))


@pytest.mark.parametrize("theme", THEMES.values())
def test_colours_are_legible(theme):
    """At least 4.5 : 1 for text against the paper, 3 : 1 for lines and bars, as WCAG asks."""

    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert contrast(theme.ink, theme.paper) > 7
    assert contrast(theme.muted, theme.paper) > 4.5
    assert all(contrast(color, theme.paper) > 3 for color in theme.series)
    assert len(set(theme.series)) == len(theme.series)


@pytest.mark.parametrize("kind", KINDS)
def test_command(kind, files, tmp_path, capsys):
    """One file a theme."""
    pytest.importorskip("matplotlib")
    source = ["--csv", str(files[kind])] if kind in FROM_FILES else []
    arguments = ["plot", kind, *source, "--theme", "light", "dark", "--output", str(tmp_path / "p.svg")]
    assert main(arguments) == 0
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(made) == {"p-light.svg", "p-dark.svg"}
    assert made["p-light.svg"] != made["p-dark.svg"]
    assert capsys.readouterr().out.count("saved") == 2
    if kind == "flow":  # the same bytes again
        assert main(arguments) == 0
        assert made == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_png_and_one_theme(tmp_path):
    """The name is kept."""
    pytest.importorskip("matplotlib")
    assert main(["plot", "flow", "--output", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def refused(capsys, *arguments):
    assert main(["plot", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_refusals(files, tmp_path, monkeypatch, capsys):
    """What is missing, in one line."""
    out = ["--output", str(tmp_path / "p.svg")]
    bench = str(files["models"])
    assert "--csv: expected the files" in refused(capsys, "roofline", *out)
    assert "expected no file for flow" in refused(capsys, "flow", "--csv", bench, *out)
    assert "No such file" in refused(capsys, "roofline", "--csv", str(tmp_path / "none.csv"), *out)
    assert "got none named stage" in refused(capsys, "timeline", "--csv", bench, *out)
    assert "ends in .svg" in refused(capsys, "flow", "--output", str(tmp_path / "p.bmp"))
    assert "ends in .svg" in refused(capsys, "flow")
    assert "expected the timeline" in refused(capsys, "flow", "--trace", str(tmp_path / "t.json"))
    assert "experts=128" in refused(capsys, "load", "--routing", saved(tmp_path, np.zeros((2, 3))), *out)
    empty = tmp_path / "empty.csv"
    empty.write_text(",".join(Case._fields) + ",product_tflops,read_tb_per_s\n")
    assert "expected rows below the header" in refused(capsys, "roofline", "--csv", str(empty), *out)
    even = write(tmp_path / "even.csv", cases(["Mixtral-8x7B"], [8]))
    assert "and another routing" in refused(capsys, "imbalance", "--csv", str(even), *out)
    even.write_text(even.read_text().replace(",785,", ",many,"))
    assert "expected a number, got 'many'" in refused(capsys, "roofline", "--csv", str(even), *out)
    assert "No such file" in refused(capsys, "flow", "--output", str(tmp_path / "no folder" / "p.svg"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    assert "pip install matplotlib" in refused(capsys, "flow", *out)


def saved(folder, array):
    np.save(folder / "rows.npy", array)
    return str(folder / "rows.npy")


def test_percents_of_baselines():
    """From their own column, else from their time."""
    row = {"layer": "x", "tokens": "1", "us": "100", "percent": "80", "us_torch": "160", "us_replication": ""}
    assert models.percents(row) == {
        "cumoe": 80, "torch": 50, "replication": None, "best_public": None, "cublas_loop": None,
    }  # fmt: skip
    assert models.percents(row | {"us_best_public": "50", "percent_best_public": "90"})["best_public"] == 90


def test_bars_are_of_one_routing():
    """The first that comes."""
    pytest.importorskip("matplotlib")
    row = {"layer": "x", "tokens": "1", "us": "100", "percent": "80", "routing": "uniform"}
    figure = models.models([row, row | {"routing": "one-hot", "percent": "30"}], THEMES["light"])
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [80]


def test_padding():
    """Rows that whole tiles add."""
    assert load.padding(np.array([8, 16, 0]), 8) == 0
    assert load.padding(np.array([1, 7, 0]), 8) == 1
    assert load.padding(np.zeros(3, int), 8) == 0


def test_trace(files, tmp_path):
    """A process a case, an event a stage, one behind the other unless the file says when it begins."""
    path = tmp_path / "out.json"
    assert main(["plot", "timeline", "--csv", str(files["timeline"]), "--trace", str(path)]) == 0
    events = json.loads(path.read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["Mixtral-8x7B, 4,096 tokens", "Qwen3-30B-A3B, 1 token"]
    first = [event for event in events if event["ph"] == "X" and event["pid"] == 0]
    assert [event["name"] for event in first] == ["route", "group", "gate/up", "down", "combine"]
    assert [event["ts"] for event in first][:3] == [0, 12.5, 18.5]
    assert first[2]["dur"] == 2653
    assert first[2]["args"] == {"per cent of its roof": 91}
    rows = [{"layer": "a", "tokens": "2", "stage": s, "us": "10", "begin_us": b} for s, b in (("x", "5"), ("y", "7"))]
    assert cases_of(rows) == {("a", "2"): [("x", 5, 10, None), ("y", 7, 10, None)]}
    assert "args" not in trace(rows)["traceEvents"][1]
    assert timeline.case_name("a", "1") == "a, 1 token"


def make():
    """Return the module that makes the pictures of the README."""
    spec = importlib.util.spec_from_file_location("make_figures", FIGURES / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_readme_say_what_was_measured():
    """Both: the one of cumoe alone, of which this reads every cell, and the one that the picture is made from."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = make().readme_rows(text)
    with (FIGURES / "public.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows  # after a change, `python .ci/figures/make.py` writes it again
    measured = read_rows([FIGURES / "bench.csv"], models.COLUMNS)
    percents = {(row["layer"], row["tokens"]): f"{float(row['percent']):.0f}" for row in measured}
    assert len(rows) == 42
    for row in rows:
        assert row["percent"] == percents[row["layer"], row["tokens"]], row
        bold = f"**{row['percent']}** / {row['percent_best_public']}"
        assert bold in text or float(row["percent"]) < float(row["percent_best_public"])
    for layer in SHAPES:
        mine = [row for row in measured if row["layer"] == layer]
        cells = [f"{float(row['us']):.0f} ({float(row['percent']):.0f})" for row in mine]
        assert f"| {layer} | {' | '.join(cells)} |" in text


@pytest.mark.parametrize("kind", ["roofline", "imbalance", "timeline", "public"])
def test_pictures_of_the_readme_have_no_text_over_another(kind):
    """With the numbers that they are made from."""
    pytest.importorskip("matplotlib")
    name, source = make().FIGURES[kind]
    nothing_is_cut_or_overlaps(figure_of(name, {name: next(FIGURES.glob(source))}, THEMES["light"]))


def test_every_picture_of_the_readme_is_there():
    """And every picture that is there has both themes."""
    listed = {path.name for path in FIGURES.glob("*.svg")}
    assert {name.removesuffix("-light.svg") for name in listed if name.endswith("-light.svg")} == {
        name.removesuffix("-dark.svg") for name in listed if name.endswith("-dark.svg")
    }
    assert {name.rsplit("-", 1)[0] for name in listed} <= set(make().FIGURES)
