"""Reading the CSV files that pictures are made from."""

import csv
from collections.abc import Sequence
from pathlib import Path

Row = dict[str, str]


def read_rows(paths: Sequence[Path], columns: Sequence[str]) -> list[Row]:
    """Return the rows of all files, one behind the other.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If one is no CSV file, lacks one of `columns`, or if there are no rows at all.
    """
    rows: list[Row] = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            try:
                reader = csv.DictReader(file)
                found = list(reader)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{path}: expected a CSV file, got {error}") from None
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: expected the columns {', '.join(columns)}, got none named {', '.join(missing)}")
        rows += found
    if not rows:
        raise ValueError(f"{', '.join(map(str, paths))}: expected rows below the header, got none")
    return rows


def number(row: Row, column: str) -> float | None:
    """Return a cell as a number, or None where it is empty or not there.

    Raises
    ------
    ValueError
        If it holds something else.
    """
    text = row.get(column) or ""
    if not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"column {column}: expected a number, got {text!r}") from None


def needed(row: Row, column: str) -> float:
    """Return a cell as a number.

    Raises
    ------
    ValueError
        If it is empty or holds something else.
    """
    value = number(row, column)
    if value is None:
        raise ValueError(f"column {column}: expected a number, got an empty cell")
    return value


def distinct(rows: Sequence[Row], column: str) -> list[str]:
    """Return the different cells of a column, in the order in which they come."""
    return list(dict.fromkeys(row[column] for row in rows))


def where_and_when(rows: Sequence[Row]) -> str:
    """Return GPU, driver and day of the rows, as far as they say."""
    parts = []
    for column, label in (("gpu", ""), ("driver", "driver "), ("cumoe", "cumoe "), ("utc", "")):
        cells = [cell for cell in distinct(rows, column) if cell] if column in rows[0] else []
        if cells:
            cells = [cell.split()[0] for cell in cells] if column == "utc" else [cell.split(",")[0] for cell in cells]
            parts.append(label + " and ".join(dict.fromkeys(cells)))
    return ", ".join(parts)
