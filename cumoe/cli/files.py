"""Hidden states and token ids in .npy files."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cumoe.cli.refusal import Refusal
from cumoe.door.checks import FLOAT_DTYPES, ID_DTYPES

DTYPES = {dtype.name: dtype for dtype in FLOAT_DTYPES}


def read_states(path: Path) -> np.ndarray:
    """Return the hidden states in a file: 2 or 3 dimensions, float32, float16 or bfloat16.

    A .npy file has no name for bfloat16: it is saved, and recognised, as 2 untyped bytes.
    """
    states = _read("--input", path)
    if states.dtype.kind == "V" and states.dtype.itemsize == 2 and states.dtype.names is None:
        states = states.view(ml_dtypes.bfloat16)
    if states.dtype not in DTYPES.values():
        raise Refusal(f"--input {path}: expected dtype float32, float16 or bfloat16, got {states.dtype}")
    if states.ndim not in (2, 3) or states.shape[-1] == 0:
        raise Refusal(f"--input {path}: expected shape (tokens, hidden) or (batch, seq, hidden), got {states.shape}")
    return states


def read_ids(path: Path) -> np.ndarray:
    """Return the token ids in a file: whole numbers, of any shape."""
    ids = _read("--input-ids", path)
    if ids.dtype not in ID_DTYPES:
        raise Refusal(f"--input-ids {path}: expected whole numbers, got {ids.dtype}")
    return ids


def _read(option: str, path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise Refusal(f"{option} {path}: {error.strerror or error}") from None
    except (ValueError, EOFError):
        raise Refusal(f"{option} {path}: expected an array saved by numpy.save, got another file") from None


def check_writable(path: Path) -> None:
    """Refuse a path that nothing can be saved to, before anything is computed."""
    if path.is_dir() or not path.parent.is_dir():
        raise Refusal(f"--output {path}: expected a file in an existing folder")


def write_states(path: Path, states: Any) -> None:
    """Save an array under exactly this name."""
    try:
        with path.open("wb") as file:
            np.save(file, states, allow_pickle=False)
    except OSError as error:
        raise Refusal(f"--output {path}: {error.strerror or error}") from None
