"""A progress bar on a terminal, where tqdm is installed, and lines that go around it."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


def _tqdm() -> Any:
    """Return tqdm's class, or None."""
    try:
        from tqdm import tqdm  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return tqdm


def with_progress(items: Sequence[Item], unit: str) -> Iterator[Item]:
    """Iterate; on a terminal, and with tqdm, a bar on stderr shows how far it is."""
    tqdm = _tqdm()
    if tqdm is None:
        yield from items
    else:
        yield from tqdm(items, unit=unit, disable=None, leave=False, dynamic_ncols=True)


def say(line: str) -> None:
    """Print a line, above the bar if there is one."""
    tqdm = _tqdm()
    if tqdm is None:
        print(line)
    else:
        tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
