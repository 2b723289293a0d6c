"""Kernel arguments: one C struct a launch, packed by field name and passed by value."""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cumoe.gpu.operand import Operand

_ALIGNED_CODES = {"Q": 8, "q": 8, "i": 4, "f": 4}
_WORDS = {"pointer": "Q", "int64": "q", "int32": "i", "float32": "f"}


class Place(NamedTuple):
    """Where in the bytes of an argument something depends on the address of one of the caller's arrays."""

    at: int  # bytes from the beginning
    source: str  # the caller's argument
    offset: int  # bytes from its first element to the address in question
    encode: Callable[[int], bytes] | None = None  # from the address to what stands there; None: the pointer itself


@dataclass(frozen=True)
class Packed:
    """The bytes of an argument or of a part of it, and the places in them that follow the caller's arrays."""

    data: bytes
    places: tuple[Place, ...] = ()

    def padded(self, num_bytes: int) -> "Packed":
        """Return the same with zeros behind, `num_bytes` in all."""
        assert len(self.data) <= num_bytes
        return replace(self, data=self.data.ljust(num_bytes, b"\0"))


def joined(parts: Iterable[Packed]) -> Packed:
    """Return the parts one behind the other."""
    data, places, begin = [], [], 0
    for part in parts:
        data.append(part.data)
        places += [place._replace(at=begin + place.at) for place in part.places]
        begin += len(part.data)
    return Packed(b"".join(data), tuple(places))


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
        self._pointers: list[tuple[int, str]] = []
        offset = 0
        for code, name in codes:
            assert offset % _ALIGNED_CODES[code] == 0, f"{name} would be padded by a C compiler"
            if code == "Q":
                self._pointers.append((offset, name))
            offset += _ALIGNED_CODES[code]
        self.itemsize = offset

    def __call__(self, **values: Any) -> Packed:
        """Return the struct's bytes; arrays stand for their device pointers, None for a null pointer.

        A pointer has to come as the array: an address alone does not say whose it is.
        """
        assert len(values) == len(self.names)
        places = []
        for at, name in self._pointers:
            array = values[name]
            assert not isinstance(array, int), f"{name} is a bare address"
            values[name] = 0 if array is None else array.data.ptr
            if isinstance(array, Operand) and array.source is not None:
                places.append(Place(at, array.source, array.offset))
        return Packed(self._struct.pack(*[values[name] for name in self.names]), tuple(places))
