"""The two halves of every test: NumPy on the CPU, CuPy on a GPU where there is one."""

import hypothesis
import pytest
from support import CPU, GPU, gpu_is_there

hypothesis.settings.register_profile(
    "cumoe", deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], print_blob=True
)
hypothesis.settings.load_profile("cumoe")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request):
    """Return where the arrays of a test live; the GPU half is skipped where there is none."""
    if request.param == "cpu":
        return CPU
    if not gpu_is_there():
        pytest.skip("no CUDA device")
    return GPU
