"""Make the pictures of the README again, from its own table and from the CSV files in this folder.

    python .ci/figures/make.py

A picture is made where a file for it is there; bench1.csv and bench2.csv, say, count as one. They come from a GPU:

    python -m cumoe bench --baselines --csv .ci/figures/bench.csv
    python -m cumoe bench --layers Qwen3-30B-A3B Mixtral-8x7B --tokens 4096 --baselines \
        --routing balanced uniform zipf:0.25 zipf:0.5 zipf:1 zipf:1.5 one-hot --csv .ci/figures/imbalance.csv
    python -m cumoe bench --stages --layers DeepSeek-V3 Qwen3-30B-A3B --tokens 1 64 4096 --csv .ci/figures/stages.csv

The last holds the six cases that the timeline has room for.
"""

import csv
import re
import sys
from pathlib import Path

from cumoe.cli.main import main as cumoe

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent.parent / "README.md"
HEAD = "% of the ceiling: cumoe / best public"
FIGURES = {
    "flow": ("flow", ""),
    "roles": ("roles", ""),
    "load": ("load", ""),
    "public": ("models", "public.csv"),
    "roofline": ("roofline", "bench*.csv"),
    "imbalance": ("imbalance", "imbalance*.csv"),
    "timeline": ("timeline", "stages*.csv"),
}
"""By name: what is drawn, and from which files; several are read one behind the other."""


def readme_rows(text: str) -> list[dict[str, str]]:
    """Return the table of both sides as rows: layer, tokens, GPUs, and the per cent of either side."""
    measured = re.findall(r"[Mm]easured on an (\w+)", text)
    table = re.search(rf"^\| {re.escape(HEAD)} \|(.*)\n\|[-:|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    if table is None or len(measured) != 2:
        raise ValueError(f"README.md: expected a table that begins with {HEAD!r}, and twice 'measured on an ...'")
    gpu = f"cumoe on an {measured[0]}; best public on an {measured[1]}; each side with the roofs of its own run"
    rows = []
    for line in table[2].splitlines():
        layer, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for count, cell in zip(re.findall(r"(\d+) tokens?", table[1]), cells, strict=True):
            ours, best = (part.strip(" *") for part in cell.split("/"))
            rows.append({"layer": layer, "tokens": count, "gpu": gpu, "percent": ours, "percent_best_public": best})
    return rows


def write_public(path: Path) -> None:
    """Write that table as a CSV file."""
    rows = readme_rows(README.read_text(encoding="utf-8"))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    """Make every picture whose file is there; return the number of those that failed."""
    write_public(FOLDER / "public.csv")
    failed = 0
    for name, (kind, source) in FIGURES.items():
        files = sorted(map(str, FOLDER.glob(source))) if source else []
        if source and not files:
            print(f"no {source}: {name} is left as it is")
            continue
        options = ["--csv", *files] if files else []
        output = str(FOLDER / f"{name}.svg")
        failed += cumoe(["plot", kind, *options, "--theme", "light", "dark", "--output", output]) != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
