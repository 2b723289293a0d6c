"""The one voice in which arguments are refused: ``name: expected this, got that``."""

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

FLOAT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
"""What tokens, weights and logits may be made of."""

FACTOR_DTYPES = (*FLOAT_DTYPES, np.dtype(np.float64))
"""What routing weights, biases and scales may be made of; they are converted to float32."""

ID_DTYPES = tuple(np.dtype(name) for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"))
"""What expert ids may be made of."""


def refuse(name: str, expected: str, got: object) -> str:
    """Return the text of a refusal."""
    return f"{name}: expected {expected}, got {got}"


def one_of(items: Sequence[object]) -> str:
    """Return ``a, b or c``."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def check_word(name: str, value: Any, words: Sequence[str]) -> str:
    """Return `value` if it is one of `words`; raise TypeError or ValueError."""
    if not isinstance(value, str):
        raise TypeError(refuse(name, f"one of the words {one_of([repr(w) for w in words])}", type(value).__name__))
    if value not in words:
        raise ValueError(refuse(name, one_of([repr(w) for w in words]), repr(value)))
    return value


def check_count(name: str, value: Any, low: int, high: int | None = None, of: str = "") -> int:
    """Return `value` as an int in ``[low, high]``; raise TypeError or ValueError."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(refuse(name, "an int", type(value).__name__))
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"an int from {low} to {high}"
        raise ValueError(refuse(name, span + of, int(value)))
    return int(value)


def check_number(name: str, value: Any, low: float = -math.inf, low_is_allowed: bool = True) -> float:
    """Return `value` as a finite float not below `low`; raise TypeError or ValueError."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(refuse(name, "a number", type(value).__name__))
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(refuse(name, "a finite number", number))
    if number < low or (number == low and not low_is_allowed):
        raise ValueError(refuse(name, f"a number {'of at least' if low_is_allowed else 'above'} {low:g}", number))
    return number


def check_dtype(name: str, array: Any, dtypes: Sequence[np.dtype]) -> None:
    """Raise TypeError unless the dtype of `array` is one of `dtypes`, in native byte order."""
    if array.dtype not in dtypes or not array.dtype.isnative:
        raise TypeError(refuse(name, f"dtype {one_of([d.name for d in dtypes])}", _dtype_name(array.dtype)))


def check_same_dtype(name: str, array: Any, dtype: np.dtype, owner: str) -> None:
    """Raise TypeError unless `array` has the dtype of `owner`."""
    if array.dtype != dtype:
        raise TypeError(refuse(name, f"dtype {dtype.name}, like {owner}", _dtype_name(array.dtype)))


def as_float_dtype(name: str, value: Any, default: Any) -> np.dtype:
    """Return the dtype that `value` (None: `default`) stands for; raise TypeError unless it is one of FLOAT_DTYPES."""
    try:
        dtype = np.dtype(default if value is None else value)
    except TypeError:
        dtype = None
    if dtype not in FLOAT_DTYPES:
        raise TypeError(refuse(name, one_of([d.name for d in FLOAT_DTYPES]), repr(value)))
    return dtype


def check_rank(name: str, array: Any, axes: Sequence[str]) -> None:
    """Raise ValueError unless `array` has one dimension for each of `axes`."""
    if array.ndim != len(axes):
        dimensions = f"{len(axes)} dimension{'s' if len(axes) > 1 else ''}"
        raise ValueError(refuse(name, f"{dimensions} ({', '.join(axes)})", f"shape {tuple(array.shape)}"))


def check_shape(name: str, array: Any, axes: dict[str, int]) -> None:
    """Raise ValueError unless the shape of `array` is the one that `axes` spells out."""
    if tuple(array.shape) != tuple(axes.values()):
        wanted = ", ".join(f"{axis}={size}" if not axis.isdigit() else axis for axis, size in axes.items())
        raise ValueError(refuse(name, f"shape ({wanted})", tuple(array.shape)))


def _dtype_name(dtype: np.dtype) -> str:
    return dtype.name if dtype.isnative else f"{dtype.name} in foreign byte order"
