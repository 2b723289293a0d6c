"""Kernel arguments: one C struct a launch, packed by field name and passed by value."""

import struct
from typing import Any

import numpy as np

_ALIGNED_CODES = {"Q": 8, "q": 8, "i": 4, "f": 4}
_WORDS = {"pointer": "Q", "int64": "q", "int32": "i", "float32": "f"}


class Struct:
    """A C struct of pointers, int64, int32 and float32 fields; each has to lie at a multiple of its size.

    Parameters
    ----------
    **fields : tuple of str
        Names of neighbouring fields of one type, by type word; wider types come first: pointer, int64, int32, float32.
        Further keywords ``int32_2`` and so on continue where the order of the C struct asks for it.
    """

    def __init__(self, **fields: tuple[str, ...]) -> None:
        codes = [(_WORDS[word.partition("_")[0]], name) for word, names in fields.items() for name in names]
        self.names = tuple(name for _, name in codes)
        self._struct = struct.Struct("=" + "".join(code for code, _ in codes))
        offset = 0
        for code, name in codes:
            assert offset % _ALIGNED_CODES[code] == 0, f"{name} would be padded by a C compiler"
            offset += _ALIGNED_CODES[code]
        self.itemsize = offset

    def pack(self, **values: Any) -> bytes:
        """Return the bytes of the struct; arrays stand for their device pointers, None for a null pointer."""
        assert len(values) == len(self.names)
        return self._struct.pack(*[_plain(values[name]) for name in self.names])

    def __call__(self, **values: Any) -> np.ndarray:
        """Return the struct as an array of one item, which CuPy passes to a kernel by value."""
        return by_value(self.pack(**values))


def by_value(packed: bytes) -> np.ndarray:
    """Return an array of one item of these bytes."""
    return np.frombuffer(packed, f"V{len(packed)}")


def _plain(value: Any) -> Any:
    if value is None:
        return 0
    return value if isinstance(value, (int, float)) else value.data.ptr
