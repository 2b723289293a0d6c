"""Reading a layer's bytes: each once, straight to its place, in pieces, by threads that stop when one fails."""

import tracemalloc

import numpy as np
import pytest
from checkpoint_files import BF16, MIXTRAL, mixtral, write_checkpoint
from support import CPU, gpu_is_there

import cumoe
from cumoe.checkpoint import pieces, read, upload
from cumoe.checkpoint.files import SINGLE, Files, read_into

pytest.importorskip("safetensors")

BLOCK = "model.layers.0.block_sparse_moe"


@pytest.fixture
def small_pieces(monkeypatch):
    """Make a matrix many pieces, the last of them shorter."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 128)


def stacked(arrays, name):
    return np.stack([arrays[f"{BLOCK}.experts.{e}.{name}.weight"] for e in range(4)])


def check_weights(layer, arrays, backend):
    """Fail unless the layer has exactly these numbers."""
    gate_up = np.concatenate([stacked(arrays, "w1"), stacked(arrays, "w3")], axis=1)
    weights = layer.experts.weights
    for got, expected in ((weights.w_gate_up, gate_up), (weights.w_down, stacked(arrays, "w2"))):
        np.testing.assert_array_equal(backend.asnumpy(got).astype(np.float32), expected.astype(np.float32))
    router = backend.asnumpy(layer.router_weight).astype(np.float32)
    np.testing.assert_array_equal(router, arrays[f"{BLOCK}.gate.weight"].astype(np.float32))


@pytest.mark.parametrize("num_readers", [1, 5])
@pytest.mark.parametrize("stored", [np.float32, BF16, np.float16])
@pytest.mark.parametrize("dtype", [None, np.float32])
def test_pieces_make_the_arrays(backend, tmp_path, rng, monkeypatch, small_pieces, stored, dtype, num_readers):
    """Read as they are or converted, by one thread or several."""
    monkeypatch.setattr(read, "NUM_READERS", num_readers)
    arrays = mixtral(rng, stored)
    folder = write_checkpoint(tmp_path / "c", MIXTRAL, arrays, 3)
    layer = cumoe.load(folder, 0, device="cpu" if backend is CPU else "gpu", dtype=dtype)
    assert layer.experts.dtype == (dtype or stored)
    check_weights(layer, arrays, backend)


def test_every_byte_is_read_once(tmp_path, rng, monkeypatch, small_pieces):
    """Those of the stacked matrices and no other; the router stays in the file."""
    seen = []

    def spy(file, begin, memory):
        seen.append((begin, begin + memory.nbytes))
        read_into(file, begin, memory)

    monkeypatch.setattr(read, "read_into", spy)
    folder = write_checkpoint(tmp_path / "c", MIXTRAL, mixtral(rng))
    cumoe.load(folder, 0, device="cpu")
    files = Files(folder)
    tensors = [files.tensor(name) for name in files.names if name.startswith(f"{BLOCK}.experts")]
    wanted = {byte for t in tensors for byte in range(t.begin, t.begin + t.num_bytes)}
    got = [byte for begin, end in seen for byte in range(begin, end)]
    assert len(got) == len(set(got))
    assert set(got) == wanted


def test_host_memory_is_the_arrays(tmp_path, rng, monkeypatch):
    """Nothing is held twice, not even while it is converted."""
    config = MIXTRAL | {"hidden_size": 256, "intermediate_size": 512}
    folder = write_checkpoint(tmp_path / "c", config, mixtral(rng, BF16, config=config))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 14)
    for dtype, itemsize in ((None, 2), (np.float32, 4)):
        tracemalloc.start()
        layer = cumoe.load(folder, 0, device="cpu", dtype=dtype)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.2 * 4 * 3 * 512 * 256 * itemsize
        assert layer.experts.dtype.itemsize == itemsize


def test_a_file_that_shrinks_while_it_is_read(backend, tmp_path, rng, monkeypatch, small_pieces):
    """It was whole when it was checked."""
    folder = write_checkpoint(tmp_path / "c", MIXTRAL, mixtral(rng))

    def shrink(plan, array):
        (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:40_000])
        return pieces.cut(plan, array)

    monkeypatch.setattr(read, "cut", shrink)
    with pytest.raises(ValueError, match=r"model.safetensors: expected a file that stays as it is, .* got 40000 bytes"):
        cumoe.load(folder, 2, device="cpu" if backend is CPU else "gpu")


def test_readers_stop_when_one_fails(tmp_path, rng, monkeypatch, small_pieces):
    """Each ends with the piece it is at."""
    calls = []

    def fail(file, begin, memory):
        calls.append(begin)
        raise OSError("the disk is gone")

    monkeypatch.setattr(read, "read_into", fail)
    monkeypatch.setattr(read, "NUM_READERS", 3)
    with pytest.raises(OSError, match="the disk is gone"):
        cumoe.load(write_checkpoint(tmp_path / "c", MIXTRAL, mixtral(rng)), 0, device="cpu")
    assert 1 <= len(calls) <= 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, np.float32])
def test_loading_waits_for_the_stream_before_it(tmp_path, rng, dtype):
    """Memory that comes back from the pool may still be written by what its stream was given."""
    if not gpu_is_there():
        pytest.skip("no CUDA device")
    import cupy
    from support import GPU

    config = MIXTRAL | {"hidden_size": 512, "intermediate_size": 1024}
    arrays = mixtral(rng, BF16, config=config)
    folder = write_checkpoint(tmp_path / "c", config, arrays)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc):
            busy = cupy.zeros(1 << 27, np.float32)
            freed = [cupy.empty(4 * 2 * 1024 * 512 * 4, np.uint8) for _ in range(2)]
            for _ in range(50):
                busy += 1
            for block in freed:
                block.fill(0xFF)
            del block, freed
            layer = cumoe.load(folder, 0, device="gpu", dtype=dtype)
        stream.synchronize()
        check_weights(layer, arrays, GPU)


@pytest.mark.gpu
def test_without_pinned_memory(tmp_path, rng, monkeypatch, caplog, small_pieces):
    """Plain memory does as well."""
    if not gpu_is_there():
        pytest.skip("no CUDA device")
    import cupy
    from support import GPU

    def refuse(size):
        raise cupy.cuda.runtime.CUDARuntimeError(2)

    monkeypatch.setattr(cupy.cuda, "PinnedMemory", refuse)
    arrays = mixtral(rng, BF16)
    with caplog.at_level("INFO", "cumoe"):
        layer = cumoe.load(write_checkpoint(tmp_path / "c", MIXTRAL, arrays), 0, device="gpu")
    check_weights(layer, arrays, GPU)
    assert "no pinned memory" in caplog.text


@pytest.mark.gpu
def test_host_buffers_are_pinned():
    if not gpu_is_there():
        pytest.skip("no CUDA device")
    import cupy

    buffer = upload.host_buffer(1 << 20)
    assert buffer.nbytes == 1 << 20
    assert cupy.cuda.runtime.pointerGetAttributes(buffer.ctypes.data).type == cupy.cuda.runtime.memoryTypeHost
