"""A progress bar on a terminal, where tqdm is installed."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def with_progress(items: Sequence[Item], unit: str) -> Iterator[Item]:
    """Iterate; on a terminal, and with tqdm, a bar on stderr shows how far it is."""
    try:
        from tqdm import tqdm  # noqa: PLC0415 - optional
    except ImportError:
        yield from items
        return
    yield from tqdm(items, unit=unit, disable=None, leave=False, dynamic_ncols=True)
