"""Which library an array comes from, and how it goes back there.

NumPy arrays are computed on the CPU, CuPy arrays on their GPU. Any other object that speaks DLPack (torch, JAX) is
viewed without a copy as the one or the other, and results return to its library without a copy. What speaks only
``__cuda_array_interface__`` (Numba) is viewed as a CuPy array, and results are CuPy arrays. Arrays of one call must
agree in library and device.
"""

import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from cumoe.door.checks import refuse
from cumoe.door.dlpack import Exported, to_numpy
from cumoe.door.streams import wait_for

log = logging.getLogger("cumoe")

try:
    import cupy
except Exception as error:  # noqa: BLE001 - an unusable cache folder raises OSError, a broken driver RuntimeError
    log.info("CuPy is not usable (%s: %s); NumPy arrays only", type(error).__name__, error)
    if isinstance(error, OSError):
        log.warning("CuPy cannot make its kernel cache: set CUPY_CACHE_DIR to a folder that can be written")
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
        NumPy, CuPy, or any DLPack exporter on the CPU or on a CUDA device; or what has a ``__cuda_array_interface__``.

    Returns
    -------
    (numpy.ndarray or cupy.ndarray, Kind)

    Raises
    ------
    TypeError
        If `array` is nothing of the kind, lives on a device that is neither, or its library does not hand it over: a
        dtype that NumPy lacks, a tensor that requires a gradient.
    ValueError
        If an array on a GPU begins, or has strides, at other bytes than multiples of its item size.
    """
    if isinstance(array, np.ndarray):
        if isinstance(array, (np.matrix, np.ma.MaskedArray)):
            raise TypeError(refuse(name, EXPECTED_ARRAY, type(array).__name__))
        return array.view(np.ndarray), Kind("numpy", "cpu")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return _aligned(name, array), Kind("cupy", f"cuda:{array.device.id}")
    if cupy is not None and hasattr(array, "__cuda_array_interface__") and not hasattr(array, "__dlpack__"):
        viewed = _from_interface(name, array)
        return _aligned(name, viewed), Kind("cupy", f"cuda:{viewed.device.id}")
    if not (hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")) or isinstance(array, np.generic):
        raise TypeError(refuse(name, EXPECTED_ARRAY, type(array).__name__))
    device_type, device_id = (int(part) for part in array.__dlpack_device__())
    library = _library_of(name, array)
    try:
        if device_type in _DLPACK_CPU:
            return to_numpy(array), Kind(library, "cpu")
        if device_type in _DLPACK_CUDA and cupy is not None:
            return _aligned(name, cupy.from_dlpack(array)), Kind(library, f"cuda:{device_id}")
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


def _aligned(name: str, array: Any) -> Any:
    """Return a CuPy array; raise ValueError if a GPU could not read its elements, which have to lie at multiples."""
    itemsize = array.dtype.itemsize
    if array.size and (array.data.ptr % itemsize or any(stride % itemsize for stride in array.strides)):
        got = f"address {array.data.ptr:#x}, strides {array.strides}"
        raise ValueError(refuse(name, f"elements at multiples of {itemsize} bytes", got))
    return array


def _from_interface(name: str, array: Any) -> Any:
    """View device memory by its interface alone; CuPy would have the host wait for the stream it names."""
    interface = dict(array.__cuda_array_interface__)
    stream = interface.pop("stream", None)
    try:
        viewed = cupy.asarray(SimpleNamespace(__cuda_array_interface__=interface, owner=array))
    except (TypeError, ValueError) as error:  # a mask; a dtype that CuPy lacks
        raise TypeError(refuse(name, "an array that CuPy can view", f"{type(array).__name__}: {error}")) from error
    if stream is not None:
        wait_for(stream, cupy)
    return viewed


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
