"""Run a layer over a file of hidden states that is larger than memory, with a progress bar.

    python -m cumoe.examples.batches

Both files are memory-mapped: a batch is read when it is computed and written when it is done.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import cumoe
from cumoe.gpu.compile import gpu_is_there


def batches(num_tokens: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` tokens; with tqdm installed, beside a progress bar."""
    slices = [slice(begin, min(begin + size, num_tokens)) for begin in range(0, num_tokens, size)]
    try:
        from tqdm import tqdm  # noqa: PLC0415 - optional
    except ImportError:
        yield from slices
        return
    yield from tqdm(slices, unit="batch")


def run_over_file(layer: cumoe.MoE, source: Path, target: Path, batch_size: int) -> None:
    """Write ``layer(x)`` for all rows of a .npy file into another of the same shape and dtype."""
    on_gpu = layer.experts.kind.on_gpu
    if on_gpu:
        import cupy  # noqa: PLC0415 - only where there is a GPU
    x = np.load(source, mmap_mode="r")
    y = np.lib.format.open_memmap(target, "w+", x.dtype, x.shape)
    for rows in batches(len(x), batch_size):
        if on_gpu:
            y[rows] = cupy.asnumpy(layer(cupy.asarray(x[rows])))
        else:
            layer(x[rows], out=y[rows])
    y.flush()


def random_layer(hidden_size: int, batch_size: int) -> cumoe.MoE:
    """Return a small layer, on the GPU if there is one; `max_tokens` reserves its memory once."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        values = rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)
        if gpu_is_there():
            import cupy  # noqa: PLC0415

            return cupy.asarray(values)
        return values

    experts = cumoe.Experts(normal(8, 2 * 96, hidden_size), normal(8, hidden_size, 96))
    router = cumoe.Router(top_k=2, renormalize=True)
    return cumoe.MoE(router, experts, router_weight=normal(8, hidden_size), max_tokens=batch_size)


def main() -> None:
    """Make a file, run over it, and compare with all of it at once."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "x.npy", Path(folder) / "y.npy"
        np.save(source, np.random.default_rng(1).standard_normal((10_000, 64), np.float32))
        layer = random_layer(64, batch_size=1024)
        run_over_file(layer, source, target, batch_size=1024)
        x, y = np.load(source), np.load(target)
        whole = Path(folder) / "whole.npy"
        run_over_file(layer, source, whole, batch_size=len(x))
        assert np.allclose(y, np.load(whole), rtol=1e-5, atol=1e-6)
        print(f"{len(y)} tokens in batches of 1024: the same as all at once")


if __name__ == "__main__":
    main()
