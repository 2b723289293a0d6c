"""The bytes of a layer in pieces, each with the place where it goes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cumoe.checkpoint.projections import Plan

PIECE_BYTES = 8 << 20
"""What is read at a time: enough for a disk, little enough for a processor's cache on the way."""


class Piece(NamedTuple):
    """Bytes of a file and the elements that they become."""

    file: Path
    begin: int
    dtype: np.dtype  # in the file
    target: Any  # 1-D and contiguous, of this dtype or a wider one

    @property
    def num_bytes(self) -> int:
        """How much is read."""
        return int(self.target.size) * self.dtype.itemsize


Put = Callable[[Piece], None]
"""Brings a piece to its place, at once or by the end of the context that gave the function."""


def cut(plan: Plan, array: Any) -> Iterator[Piece]:
    """Yield what fills an array, at most PIECE_BYTES at a time."""
    itemsize = plan.dtype.itemsize
    step = PIECE_BYTES // itemsize
    for tensor, begin, _, target in plan.copies:
        elements = array[target].reshape(-1)
        for i in range(0, elements.size, step):
            yield Piece(tensor.file, tensor.begin + begin + i * itemsize, plan.dtype, elements[i : i + step])
