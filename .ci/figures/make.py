"""Make the pictures of the README again, from its own tables and from the CSV files in this folder.

    python .ci/figures/make.py

A picture is made where a file for it is there; bench1.csv and bench2.csv, say, count as one. They come from a GPU:

    python -m cumoe bench --csv .ci/figures/bench.csv
    python -m cumoe bench --layers Qwen3-30B-A3B DeepSeek-V3 Mixtral-8x7B --tokens 4096 --baselines \
        --routing balanced uniform zipf:0.25 zipf:0.5 zipf:1 zipf:1.5 one-hot --csv .ci/figures/imbalance.csv
    stages.csv: a line a stage with the columns layer, tokens, stage, us and, where known, begin_us and percent
"""

import csv
import re
import sys
from pathlib import Path

from cumoe.cli.main import main as cumoe

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent.parent / "README.md"
TABLES = {"us": "us: cumoe / best public", "percent": "% of the ceiling: cumoe / best public"}
FIGURES = {
    "flow": ("flow", ""),
    "roles": ("roles", ""),
    "load": ("load", ""),
    "public": ("models", "public.csv"),
    "models": ("models", "bench*.csv"),
    "roofline": ("roofline", "bench*.csv"),
    "imbalance": ("imbalance", "imbalance*.csv"),
    "timeline": ("timeline", "stages*.csv"),
}
"""By name: what is drawn, and from which files; several are read one behind the other."""


def readme_rows(text: str) -> list[dict[str, str]]:
    """Return the two tables of the performance section as rows: layer, tokens, and both numbers of both tables."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    measured = re.search(r"^Measured on an (\w+)", text, re.MULTILINE)
    gpu = f"{measured[1]}; each side with the roofs of its own run" if measured else ""
    for name, head in TABLES.items():
        table = re.search(rf"^\| {re.escape(head)} \|(.*)\n\|[-:|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
        if table is None:
            raise ValueError(f"README.md has no table that begins with {head!r}")
        tokens = re.findall(r"(\d+) tokens?", table[1])
        for line in table[2].splitlines():
            layer, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            for count, cell in zip(tokens, cells, strict=True):
                ours, best = (part.strip(" *") for part in cell.split("/"))
                row = rows.setdefault((layer, count), {"layer": layer, "tokens": count})
                row |= {name: ours, f"{name}_best_public": best, "gpu": gpu}
    return list(rows.values())


def write_public(path: Path) -> None:
    """Write the tables of the README as a CSV file."""
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
