"""Filling the arrays of a layer: every byte goes once from the files to where it is computed with."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import Any, Literal, Protocol

import numpy as np

from cumoe.checkpoint.files import Files, read_into
from cumoe.checkpoint.pieces import Piece, Put, cut
from cumoe.checkpoint.projections import Plan
from cumoe.checkpoint.upload import upload
from cumoe.door.arrays import cupy

Progress = Literal["bar", "none"]

NUM_READERS = min(8, 2 * (os.cpu_count() or 1))
"""Threads that read: a disk wants several requests at a time, and a GPU's link more than one core can copy."""


class Bar(Protocol):
    """What is asked of a progress bar."""

    def update(self, n: int) -> Any:
        """Say that `n` more bytes have been read."""


def read(
    files: Files, plans: dict[str, Plan], on_gpu: bool, widen: np.dtype | None, progress: Progress
) -> dict[str, Any]:
    """Return the arrays of the plans, NumPy or, on a GPU, CuPy on its current device.

    On the CPU an array that is a whole tensor is a read-only view of the mapped file: nothing is copied. All others are
    read straight into their places, in the order of the bytes in the files, by `NUM_READERS` threads.

    Parameters
    ----------
    files : Files
    plans : dict of Plan
    on_gpu : bool
    widen : dtype or None
        What floating-point numbers are converted to.
    progress : {"bar", "none"}
    """
    arrays: dict[str, Any] = {}
    pieces: list[Piece] = []
    for name, plan in plans.items():
        dtype = widen if widen is not None and plan.dtype.kind not in "iu" else plan.dtype
        if plan.whole is not None and not on_gpu and dtype == plan.dtype:
            view = files.view(plan.whole, plan.shape)
            if view.flags.aligned:
                arrays[name] = plan.viewed(view)
                continue
        array = (cupy if on_gpu else np).empty(plan.shape, dtype)
        pieces += cut(plan, array)
        arrays[name] = plan.viewed(array)
    pieces.sort(key=lambda piece: (piece.file, piece.begin))
    largest = max((piece.num_bytes for piece in pieces), default=0)
    putter = upload(largest) if on_gpu else _in_place
    with _bar(sum(piece.num_bytes for piece in pieces), progress) as bar:
        _read_in_threads(deque(pieces), putter, bar)
    return arrays


def _read_in_threads(pieces: deque[Piece], putter: Callable[[], AbstractContextManager[Put]], bar: Bar) -> None:
    """Bring all pieces to their places; after an error, or where the user interrupts, no reader begins another one."""
    lock = Lock()

    def work() -> None:
        with putter() as put:
            while pieces:
                try:
                    piece = pieces.popleft()
                except IndexError:  # another reader was faster
                    break
                put(piece)
                with lock:
                    bar.update(piece.num_bytes)

    num_readers = min(NUM_READERS, len(pieces))
    with ThreadPoolExecutor(num_readers or 1) as pool:
        try:
            for reader in as_completed([pool.submit(work) for _ in range(num_readers)]):
                reader.result()
        finally:
            pieces.clear()


@contextmanager
def _in_place() -> Iterator[Put]:
    """Give a function that reads into NumPy arrays."""

    def put(piece: Piece) -> None:
        if piece.target.dtype == piece.dtype:
            read_into(piece.file, piece.begin, piece.target.view(np.uint8))
        else:
            narrow = np.empty(piece.target.shape, piece.dtype)
            read_into(piece.file, piece.begin, narrow.view(np.uint8))
            piece.target[...] = narrow

    yield put


class _NoBar:
    def update(self, n: int) -> None:
        """Show nothing."""


@contextmanager
def _bar(num_bytes: int, progress: Progress) -> Iterator[Bar]:
    """Yield a bar on stderr, shown in a terminal if tqdm is installed."""
    if progress == "bar":
        try:
            from tqdm import tqdm  # noqa: PLC0415 - optional
        except ImportError:
            pass
        else:
            with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="layer", disable=None, leave=False) as bar:
                yield bar
            return
    yield _NoBar()
