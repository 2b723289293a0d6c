"""Which library an array comes from, and how it goes back there.

NumPy arrays are computed on the CPU, CuPy arrays on their GPU. Any other object that speaks DLPack (torch, JAX) is
viewed without a copy as the one or the other, and results return to its library without a copy. Arrays of one call
must agree in library and device.
"""

import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from cumoe.door.checks import refuse
from cumoe.door.dlpack import Exported, to_numpy

log = logging.getLogger("cumoe")

try:
    import cupy
except Exception as error:  # noqa: BLE001 - an unusable cache folder raises OSError, a broken driver RuntimeError
    log.info("CuPy is not usable (%s: %s); NumPy arrays only", type(error).__name__, error)
    cupy = None

_DLPACK_CPU = (1,)
_DLPACK_CUDA = (2, 13)  # device memory, managed memory

EXPECTED_ARRAY = "a NumPy array, a CuPy array or an object with __dlpack__"


class Kind(NamedTuple):
    """Where an array lives and which library it belongs to."""

    library: str  # "numpy", "cupy", or the exporter's top-level package: "torch", "jax"
    device: str  # "cpu", "cuda:0", ...

    @property
    def on_gpu(self) -> bool:
        """Whether the CUDA kernels serve this kind."""
        return self.device != "cpu"

    def __str__(self) -> str:
        """Return for example ``a torch array on cuda:0``."""
        return f"a {self.library} array on {self.device}"


_importers: dict[str, Callable[[Any], Any]] = {}  # library -> its from_dlpack


def admit(name: str, array: Any) -> tuple[Any, Kind]:
    """View `array` as a NumPy or CuPy array, without a copy.

    Parameters
    ----------
    name : str
        The argument's name, for messages.
    array : array
        NumPy, CuPy, or any DLPack exporter on the CPU or on a CUDA device.

    Returns
    -------
    (numpy.ndarray or cupy.ndarray, Kind)

    Raises
    ------
    TypeError
        If `array` is nothing of the kind, lives on a device that is neither, or its library does not hand it over: a
        dtype that NumPy lacks, a tensor that requires a gradient.
    """
    if isinstance(array, np.ndarray):
        if isinstance(array, (np.matrix, np.ma.MaskedArray)):
            raise TypeError(refuse(name, EXPECTED_ARRAY, type(array).__name__))
        return array.view(np.ndarray), Kind("numpy", "cpu")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return array, Kind("cupy", f"cuda:{array.device.id}")
    if not (hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")) or isinstance(array, np.generic):
        raise TypeError(refuse(name, EXPECTED_ARRAY, type(array).__name__))
    device_type, device_id = (int(part) for part in array.__dlpack_device__())
    library = _library_of(name, array)
    try:
        if device_type in _DLPACK_CPU:
            return to_numpy(array), Kind(library, "cpu")
        if device_type in _DLPACK_CUDA and cupy is not None:
            return cupy.from_dlpack(array), Kind(library, f"cuda:{device_id}")
    except (TypeError, BufferError) as error:  # a dtype that NumPy lacks; a tensor that requires a gradient
        raise TypeError(refuse(name, "an array that DLPack can hand over", f"{library}: {error}")) from error
    raise TypeError(refuse(name, "an array on the CPU or on a CUDA device", f"DLPack device type {device_type}"))


def admit_like(name: str, array: Any, kind: Kind, owner: str) -> Any:
    """View `array` as `admit` does and raise TypeError unless it is of the given kind (that of `owner`)."""
    viewed, own_kind = admit(name, array)
    check_kind(name, own_kind, kind, owner)
    return viewed


def check_kind(name: str, own_kind: Kind, kind: Kind, owner: str) -> None:
    """Raise TypeError unless two already admitted things agree in library and device."""
    if own_kind != kind:
        raise TypeError(refuse(name, f"{kind}, like {owner}", str(own_kind)))


def on_device(kind: Kind) -> AbstractContextManager[Any]:
    """Make the GPU of `kind` the current device for a while; does nothing for the CPU."""
    return cupy.cuda.Device(int(kind.device.partition(":")[2])) if kind.on_gpu else nullcontext()


def give_back(array: Any, kind: Kind) -> Any:
    """Hand a result to the library that the input came from, without a copy."""
    if kind.library in ("numpy", "cupy"):
        return array
    return _importers[kind.library](Exported(array) if isinstance(array, np.ndarray) else array)


def _library_of(name: str, array: Any) -> str:
    """Return the exporter's library and remember its ``from_dlpack``."""
    package = type(array).__module__.split(".")[0]
    namespace: Any = sys.modules.get(package)
    if hasattr(array, "__array_namespace__"):
        namespace = array.__array_namespace__()
    if not hasattr(namespace, "from_dlpack"):
        raise TypeError(refuse(name, "an exporter whose library has from_dlpack", f"{package}.{type(array).__name__}"))
    library = namespace.__name__.split(".")[0]
    _importers.setdefault(library, namespace.from_dlpack)
    return library
