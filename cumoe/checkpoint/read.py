"""Filling the arrays of a layer: every byte goes once from the mapped files to where it is computed with."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import numpy as np

from cumoe.checkpoint.files import Files, Tensor
from cumoe.checkpoint.projections import Copy, Plan
from cumoe.door.arrays import cupy

Progress = Literal["bar", "none"]

AHEAD_BYTES = 256 << 20
"""How much is asked of the disk before it is needed."""


class Bar(Protocol):
    """What is asked of a progress bar."""

    def update(self, n: int) -> Any:
        """Say that `n` more bytes have been read."""


def read(
    files: Files, plans: dict[str, Plan], on_gpu: bool, widen: np.dtype | None, progress: Progress
) -> dict[str, Any]:
    """Return the arrays of the plans, NumPy or, on a GPU, CuPy on its current device.

    On the CPU an array that is a whole tensor is a read-only view of the mapped file: nothing is copied. All others are
    filled in the order of the bytes in the files.

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
    jobs: list[tuple[Copy, Any]] = []
    for name, plan in plans.items():
        dtype = widen if widen is not None and plan.dtype.kind not in "iu" else plan.dtype
        if plan.whole is not None and not on_gpu and dtype == plan.dtype:
            view = files.view(plan.whole).reshape(plan.shape)
            if view.flags.aligned:
                arrays[name] = plan.viewed(view)
                continue
        array = (cupy if on_gpu else np).empty(plan.shape, dtype)
        jobs += [(copy, array) for copy in plan.copies]
        arrays[name] = plan.viewed(array)
    jobs.sort(key=lambda job: (job[0].tensor.file, job[0].tensor.begin))  # stable: runs of a tensor stay in order
    with _bar(sum(array[copy.target].nbytes for copy, array in jobs), progress) as bar:
        for copy, array in _read_ahead(files, jobs):
            source = files.view(copy.tensor)[copy.source]
            target = array[copy.target]
            source = source.astype(array.dtype, copy=False).reshape(target.shape)
            if on_gpu:
                target.set(source)
            else:
                target[...] = source
            bar.update(target.nbytes)
    return arrays


def _read_ahead(files: Files, jobs: list[tuple[Copy, Any]]) -> Iterator[tuple[Copy, Any]]:
    """Yield the jobs, while a thread fetches the tensors of the next ones; a tensor is released after its last job."""
    last = {copy.tensor: number for number, (copy, _) in enumerate(jobs)}
    tensors = list(last)  # in the order of their first jobs
    fetched: dict[Tensor, Future[None]] = {}
    ahead = 0
    with ThreadPoolExecutor(1) as pool:
        for number, (copy, array) in enumerate(jobs):
            while len(fetched) < len(tensors) and (ahead < AHEAD_BYTES or copy.tensor not in fetched):
                tensor = tensors[len(fetched)]
                fetched[tensor] = pool.submit(files.fetch, tensor)
                ahead += tensor.num_bytes
            fetched[copy.tensor].result()
            yield copy, array
            if last[copy.tensor] == number:
                files.release(copy.tensor)
                ahead -= copy.tensor.num_bytes


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
