"""The two halves of every test: NumPy on the CPU, CuPy on a GPU where there is one."""

import os

import hypothesis
import numpy as np
import pytest
from checkpoint_files import MIXTRAL, mixtral, write_checkpoint
from support import CPU, GPU, gpu_is_there

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes most of a GPU's memory when it starts

hypothesis.settings.register_profile(
    "cumoe", deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], print_blob=True
)
hypothesis.settings.load_profile("cumoe")


def pytest_runtest_setup(item):
    """Skip the GPU half where there is no GPU."""
    if item.get_closest_marker("gpu") and not gpu_is_there():
        pytest.skip("no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request):
    """Return where the arrays of a test live."""
    return CPU if request.param == "cpu" else GPU


@pytest.fixture
def jax():
    """Return JAX, with host arrays where nothing else is said, also on a machine with a GPU."""
    module = pytest.importorskip("jax")
    with module.default_device(module.devices("cpu")[0]):
        yield module


@pytest.fixture
def rng():
    """Return a generator that gives every test the same numbers."""
    return np.random.default_rng(7)


@pytest.fixture
def arrays(rng):
    """Return the tensors of a tiny Mixtral checkpoint, for the tests of checkpoints."""
    return mixtral(rng)


@pytest.fixture
def checkpoint(tmp_path, arrays):
    """Return the folder of that checkpoint."""
    return write_checkpoint(tmp_path / "checkpoint", MIXTRAL, arrays)
