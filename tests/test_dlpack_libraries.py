"""Host arrays between NumPy and torch or JAX by DLPack."""

import gc
import weakref

import numpy as np
import pytest
from dlpack_exporter import BF16, SHARED, Tracked, address, aligned, bytes_of, tracked

from cumoe.door.dlpack import Exported, to_numpy


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


TORCH_NAMES = ["float32", "float16", "int32", "bfloat16"]


@pytest.mark.parametrize(("name", "dtype"), list(zip(TORCH_NAMES, SHARED, strict=True)))
@pytest.mark.parametrize("shape", [(), (2, 3), (0, 3)])
def test_from_torch(torch, shape, name, dtype):
    tensor = torch.zeros(shape, dtype=getattr(torch, name))
    array = to_numpy(tensor)
    assert array.dtype == dtype
    assert array.shape == shape
    assert array.flags.writeable
    if array.size:
        assert address(array) == tensor.data_ptr()
        array[...] = 7
        assert bool((tensor == 7).all())


def test_from_torch_views(torch):
    tensor = torch.arange(24).reshape(4, 6).to(torch.bfloat16)
    view = tensor[1:, ::2].T
    array = to_numpy(view)
    assert address(array) == view.data_ptr()
    assert np.array_equal(array.astype(np.float32), view.float().numpy())


class OldTorch:
    """A torch tensor of a release that knows legacy capsules alone."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, stream=None):
        return self.tensor.__dlpack__()

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __iadd__(self, other):
        self.tensor += other
        return self


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_from_torch_by_a_legacy_capsule(torch, name):
    tensor = torch.zeros((2, 3), dtype=getattr(torch, name))
    array = to_numpy(OldTorch(tensor))
    assert address(array) == tensor.data_ptr()
    array[1, 1] = 7
    assert float(tensor[1, 1]) == 7


def test_torch_memory_is_held_by_the_array(torch):
    tensor = torch.arange(1024).to(torch.bfloat16)
    array = to_numpy(tensor)[5:]
    del tensor
    gc.collect()
    filler = [torch.full((1024,), -1.0, dtype=torch.bfloat16) for _ in range(64)]
    assert float(array[0]) == 5
    del filler


def test_torch_refusals(torch):
    with pytest.raises(TypeError, match="exporter: expected a dtype with a NumPy counterpart"):
        to_numpy(torch.zeros(3, dtype=torch.float8_e4m3fn))
    with pytest.raises(BufferError, match="gradient"):
        to_numpy(torch.ones(3, requires_grad=True))


@pytest.mark.parametrize(("name", "dtype"), list(zip(TORCH_NAMES, SHARED, strict=True)))
def test_to_torch(torch, name, dtype):
    array, alive = tracked(dtype)
    expected = array.astype(np.float64).tolist()
    where = address(array)
    tensor = torch.from_dlpack(Exported(array))
    assert tensor.dtype == getattr(torch, name)
    assert tensor.data_ptr() == where
    assert tensor.tolist() == expected
    tensor[2] = 9
    assert array[2] == 9
    del array
    gc.collect()
    assert alive() is not None
    assert tensor[2] == 9
    del tensor
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("dtype", SHARED)
def test_to_torch_of_views(torch, dtype):
    array = np.arange(24).reshape(4, 6).astype(dtype)
    for view in (array.T, array[1:, ::2], array[:0], array[:1][::-1]):
        tensor = torch.from_dlpack(Exported(view))
        assert tuple(tensor.shape) == view.shape
        assert tensor.tolist() == view.astype(np.float64).tolist()
        if view.size:
            assert tensor.data_ptr() == address(view)


def test_to_torch_by_a_legacy_capsule(torch):
    array, alive = tracked(BF16)
    where = address(array)
    tensor = torch.from_dlpack(Exported(array).__dlpack__())
    del array
    gc.collect()
    assert tensor.dtype == torch.bfloat16
    assert tensor.data_ptr() == where
    assert tensor.tolist() == [0, 1, 2, 3]
    del tensor
    gc.collect()
    assert alive() is None


# ---- JAX -----------------------------------------------------------------------------------------


@pytest.fixture
def jnp(jax):
    return jax.numpy


@pytest.mark.parametrize("dtype", SHARED)
def test_from_jax_is_read_only(jnp, dtype):
    source = jnp.arange(6).reshape(2, 3).astype(dtype)
    array = to_numpy(source)
    assert array.dtype == dtype
    assert address(array) == source.unsafe_buffer_pointer()
    assert array.astype(np.int64).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert not array.flags.writeable


@pytest.mark.parametrize("dtype", SHARED)
def test_to_jax(jnp, dtype):
    array = aligned((2, 4), dtype)
    result = jnp.from_dlpack(Exported(array))
    assert result.dtype == dtype
    assert result.unsafe_buffer_pointer() == address(array)
    assert bytes_of(np.asarray(result)) == bytes_of(array)


@pytest.mark.parametrize("dtype", SHARED)
def test_jax_frees_the_array(jnp, dtype):
    array = aligned((4,), dtype).view(Tracked)
    alive = weakref.ref(array)
    result = jnp.from_dlpack(Exported(array))
    assert result.unsafe_buffer_pointer() == address(array)
    del array
    gc.collect()
    assert alive() is not None
    del result
    gc.collect()
    assert alive() is None
