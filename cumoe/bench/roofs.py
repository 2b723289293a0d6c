"""What the GPU could do at best, measured in the same process."""

from typing import Any, NamedTuple

import numpy as np

from cumoe.bench.draw import fill
from cumoe.bench.timer import Timer, free_pool
from cumoe.door.arrays import cupy
from cumoe.gpu.compile import num_multiprocessors

STREAM_BYTES = 8 << 30  # what the bandwidths are measured with
PRODUCT_SIZE = 8192

READ_SOURCE = r"""
extern "C" __global__ void read_all(const uint4* data, size_t size, unsigned int* out) {
    const size_t stride = (size_t)gridDim.x * blockDim.x;
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned int found = 0;
    for (; i + 7 * stride < size; i += 8 * stride) {
        uint4 v[8];
        #pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = data[i + j * stride];
        #pragma unroll
        for (int j = 0; j < 8; ++j) found |= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < size; i += stride) found |= data[i].x ^ data[i].y ^ data[i].z ^ data[i].w;
    if (found == 1) *out = found;  // never so, but now the loads have to be done
}
"""


class Roofs(NamedTuple):
    """What the GPU reached in this process."""

    product: float  # operations a second of a matrix product through cuBLAS
    copy: float  # bytes a second, read and written
    read: float  # bytes a second, read alone

    def ceiling(self, flops: int, num_bytes: int) -> float:
        """Return the least us for so many operations and so many bytes read, whichever takes longer."""
        return 1e6 * max(flops / self.product, num_bytes / self.read)

    def binding(self, flops: int, num_bytes: int) -> str:
        """Return which of the two takes longer: "product" or "read"."""
        return "product" if flops / self.product > num_bytes / self.read else "read"


def measure_roofs(timer: Timer, dtype: Any) -> Roofs:
    """Measure a matrix product and the bandwidths.

    Raises
    ------
    ImportError
        If cuBLAS is not installed.
    """
    a, b, c = (fill(cupy, cupy.empty((PRODUCT_SIZE, PRODUCT_SIZE), dtype), seed, 1.0) for seed in range(3))
    try:
        product = timer.us(lambda: cupy.matmul(a, b, out=c), "launches")  # CuPy does not let cuBLAS be captured
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ImportError(f"the ceiling needs cuBLAS, pip install nvidia-cublas-cu12 brings it: {reason}") from None
    free_pool()
    num_bytes = min(STREAM_BYTES, cupy.cuda.runtime.memGetInfo()[0] // 2) // 32 * 32
    data = fill(cupy, cupy.empty(num_bytes // 2, dtype), 3, 1.0).view(np.uint8)
    half, other = data[: num_bytes // 2], data[num_bytes // 2 :]
    copy = timer.us(lambda: other.data.copy_from_device_async(half.data, half.nbytes), "launches")
    kernel, out = cupy.RawKernel(READ_SOURCE, "read_all"), cupy.zeros(1, np.uint32)
    grid = (8 * num_multiprocessors(cupy.cuda.Device().id),)
    read = timer.us(lambda: kernel(grid, (256,), (data, np.uint64(num_bytes // 16), out)))
    return Roofs(2e6 * PRODUCT_SIZE**3 / product, 1e6 * num_bytes / copy, 1e6 * num_bytes / read)
