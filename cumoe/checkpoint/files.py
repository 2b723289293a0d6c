"""The safetensors files of a checkpoint: which tensor lies where, views of tensors, and reading of their bytes."""

import json
import math
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cumoe.door.checks import refuse

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8),
}  # fmt: skip
"""Names of dtypes in a safetensors header; files may hold others, which no array of a layer is made of."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensor(NamedTuple):
    """Where a tensor lies; its bounds have been checked against the file."""

    name: str
    file: Path
    dtype_name: str
    shape: tuple[int, ...]
    begin: int  # byte offset in the file
    num_bytes: int

    @property
    def dtype(self) -> np.dtype | None:
        """The NumPy dtype; None if there is none for it."""
        return DTYPES.get(self.dtype_name)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(refuse(str(path), "a file", "none"))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(refuse(str(path), "JSON", f"{error}")) from None
    if not isinstance(found, dict):
        raise ValueError(refuse(str(path), "a JSON object", type(found).__name__))
    return found


class Files:
    """The tensors of a checkpoint by name.

    Headers are read when a tensor of their file is first asked for. A header is parsed here, and not asked of the
    safetensors library, because that hands out copies and none at all of bfloat16 to NumPy; the library still judges
    every file that is opened (holes, overlaps, duplicates).

    Parameters
    ----------
    folder : Path

    Raises
    ------
    FileNotFoundError
        If there is no folder or no safetensors file in it.
    ValueError
        If the index is none.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(refuse("path", "the folder of a checkpoint", str(folder)))
        self.folder = folder
        self._headers: dict[Path, dict[str, Tensor]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._file_of = {name: folder / file for name, file in self._index().items()}

    def _index(self) -> dict[str, str]:
        """Return the file of every tensor, from the index or, without one, from all headers."""
        if (self.folder / INDEX).is_file() and not (self.folder / SINGLE).is_file():
            weight_map = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise ValueError(refuse(INDEX, "a weight_map from tensors to files", type(weight_map).__name__))
            return weight_map
        single = self.folder / SINGLE
        files = [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))
        if not files:
            found = sorted({path.suffix or path.name for path in self.folder.iterdir()})
            raise FileNotFoundError(refuse(str(self.folder), "safetensors files", f"only {found}"))
        return {name: file.name for file in files for name in self._header(file)}

    @property
    def names(self) -> list[str]:
        """All tensors."""
        return list(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """Return where a tensor lies.

        Raises
        ------
        FileNotFoundError
            If its file is missing.
        ValueError
            If there is no such tensor, the file does not hold what the index says, or it is no whole safetensors file.
        ImportError
            If safetensors is not installed.
        """
        if name not in self._file_of:
            raise ValueError(refuse(name, f"a tensor of this name in {self.folder}", "none"))
        file = self._file_of[name]
        header = self._header(file)
        if name not in header:
            raise ValueError(refuse(name, f"a tensor of this name in {file.name}, as {INDEX} says", "none"))
        return header[name]

    def view(self, tensor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
        """Return the first numbers of a tensor as a read-only array on the mapped file, read when they are used."""
        assert tensor.dtype is not None
        num_bytes = math.prod(shape) * tensor.dtype.itemsize
        data = np.frombuffer(self._map(tensor.file), np.uint8, num_bytes, tensor.begin)
        return data.view(tensor.dtype).reshape(shape)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]

    def _header(self, file: Path) -> dict[str, Tensor]:
        if file not in self._headers:
            self._headers[file] = read_header(file)
        return self._headers[file]


def read_header(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file; raise as `Files.tensor` does."""
    if not file.is_file():
        raise FileNotFoundError(refuse(str(file), "a shard that the index names", "no such file"))
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(refuse(str(file), f"a safetensors file with a header of {length} bytes", f"{size} bytes"))
        text = stream.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        found = {name: _tensor(name, file, entry, 8 + length) for name, entry in entries.items()}
    except (UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(refuse(str(file), "a safetensors header", f"{type(error).__name__}: {error}")) from None
    end = max((tensor.begin + tensor.num_bytes for tensor in found.values()), default=0)
    if end > size:
        raise ValueError(refuse(str(file), f"{end} bytes, as its header says", f"{size} bytes: the file is truncated"))
    for tensor in found.values():
        if tensor.dtype is not None and math.prod(tensor.shape) * tensor.dtype.itemsize != tensor.num_bytes:
            what = f"{math.prod(tensor.shape)} numbers of {tensor.dtype_name}"
            raise ValueError(refuse(tensor.name, f"{what} in {file.name}", f"{tensor.num_bytes} bytes"))
    _let_the_library_judge(file)
    return found


def read_into(file: Path, begin: int, memory: np.ndarray) -> None:
    """Fill an array of bytes from a file, in large pieces and without the interpreter's lock.

    Raises
    ------
    ValueError
        If the file has become shorter than its header said.
    """
    left = memory.data
    with file.open("rb", buffering=0) as stream:
        stream.seek(begin)
        while left:
            got = stream.readinto(left)
            if not got:
                what = f"a file that stays as it is, of {begin + memory.nbytes} bytes or more"
                raise ValueError(refuse(str(file), what, f"{file.stat().st_size} bytes while it was read"))
            left = left[got:]


def _tensor(name: str, file: Path, entry: dict[str, Any], data: int) -> Tensor:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(length) for length in entry["shape"])
    if not 0 <= begin <= end or any(length < 0 for length in shape):
        raise ValueError(f"{name} has shape {shape} and lies from {begin} to {end}")
    return Tensor(name, file, str(entry["dtype"]), shape, data + begin, end - begin)


def _let_the_library_judge(file: Path) -> None:
    try:
        import safetensors  # noqa: PLC0415 - an extra: only checkpoints need it
    except ImportError:
        raise ImportError('cumoe: reading checkpoints needs safetensors; pip install "cumoe[hf]" brings it') from None
    try:
        with safetensors.safe_open(file, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(refuse(str(file), "a safetensors file", f"{error}")) from None
