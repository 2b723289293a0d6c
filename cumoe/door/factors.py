"""Routing weights, biases and scales: any float dtype comes in, every stage computes with contiguous float32."""

from typing import Any

import numpy as np

from cumoe.door.arrays import Kind, admit_like
from cumoe.door.checks import FACTOR_DTYPES, check_dtype, check_shape


def admit_factors(name: str, array: Any, axes: dict[str, int], kind: Kind, owner: str) -> Any:
    """View `array` as `as_factors` returns it; None stays None.

    Raises
    ------
    TypeError
        If it is no array, not of the given kind (that of `owner`), or not of a float dtype.
    ValueError
        If its shape is not the one that `axes` spells out.
    """
    if array is None:
        return None
    array = admit_like(name, array, kind, owner)
    check_dtype(name, array, FACTOR_DTYPES)
    check_shape(name, array, axes)
    return as_factors(array)


def as_factors(array: Any) -> Any:
    """Return an admitted array as contiguous float32, itself if it is that already: kernels read it without strides."""
    return array.astype(np.float32, order="C", copy=False)
