"""What a few families put around the experts: norms, latent projections, identity experts, a last bias."""

from typing import Any, NamedTuple

import numpy as np

from cumoe.door.arrays import Kind, admit, admit_like, check_kind
from cumoe.door.checks import (
    FACTOR_DTYPES,
    FLOAT_DTYPES,
    check_count,
    check_dtype,
    check_number,
    check_rank,
    check_same_dtype,
    check_shape,
    refuse,
)
from cumoe.door.factors import admit_factors, as_factors
from cumoe.door.streams import on_producers_stream


class RMSNorm:
    """``v / sqrt(mean(v^2) + eps) * weight``, over the hidden axis.

    Parameters
    ----------
    weight : (hidden_size,) array
        Any float dtype; converted to float32.
    eps : float
        Not negative.

    Raises
    ------
    TypeError, ValueError
        If `weight` is no array of one dimension and a float dtype, or `eps` is no such number.
    """

    @on_producers_stream
    def __init__(self, weight: Any, eps: float = 1e-6) -> None:
        weight, self.kind = admit("weight", weight)
        check_rank("weight", weight, ("hidden_size",))
        check_dtype("weight", weight, FACTOR_DTYPES)
        self.weight, self.eps = as_factors(weight), check_number("eps", eps, low=0.0)


class Latent:
    """Projections around the routed experts, which live in a narrower space than the tokens (Nemotron-H).

    ::

        routed = w_out (sum_j weight_j * Expert_e(w_in x + b_in)) + b_out

    Router and shared experts see x itself.

    Parameters
    ----------
    w_in : (latent_size, hidden_size) array, float32, float16 or bfloat16
        In the dtype of the experts. Any strides.
    w_out : (hidden_size, latent_size) array, like `w_in`
    b_in : (latent_size,) array, optional
        Any float dtype; converted to float32.
    b_out : (hidden_size,) array, optional

    Attributes
    ----------
    hidden_size, latent_size : int

    Raises
    ------
    TypeError, ValueError
        If something is no array, dtypes differ, a shape does not fit, or arrays differ in library or device.
    """

    @on_producers_stream
    def __init__(self, w_in: Any, w_out: Any, b_in: Any = None, b_out: Any = None) -> None:
        self.w_in, self.kind = admit("w_in", w_in)
        check_rank("w_in", self.w_in, ("latent_size", "hidden_size"))
        check_dtype("w_in", self.w_in, FLOAT_DTYPES)
        self.latent_size, self.hidden_size = self.w_in.shape
        self.w_out = admit_like("w_out", w_out, self.kind, "w_in")
        check_same_dtype("w_out", self.w_out, self.w_in.dtype, "w_in")
        check_shape("w_out", self.w_out, {"hidden_size": self.hidden_size, "latent_size": self.latent_size})
        self.b_in = admit_factors("b_in", b_in, {"latent_size": self.latent_size}, self.kind, "w_in")
        self.b_out = admit_factors("b_out", b_out, {"hidden_size": self.hidden_size}, self.kind, "w_in")
        self.dtype = self.w_in.dtype


class Frame(NamedTuple):
    """What a layer has around its experts; all of it may be absent."""

    input_norm: RMSNorm | None = None
    latent: Latent | None = None
    num_identity_experts: int = 0
    output_bias: Any = None  # (hidden_size,) float32
    output_norm: RMSNorm | None = None

    @property
    def has_end(self) -> bool:
        """Whether the sum of the experts is not the result yet."""
        return bool(self.latent or self.num_identity_experts or self.output_norm) or self.output_bias is not None


def check_frame(frame: Frame, hidden_size: int, dtype: np.dtype, kind: Kind) -> Frame:
    """Return the frame as kernels take it; raise unless all fits tokens of `hidden_size` and the experts."""
    for name in ("input_norm", "output_norm"):
        norm = getattr(frame, name)
        if norm is None:
            continue
        if not isinstance(norm, RMSNorm):
            raise TypeError(refuse(name, "a cumoe.RMSNorm", type(norm).__name__))
        check_kind(name, norm.kind, kind, "experts")
        check_shape(name, norm.weight, {"hidden_size": hidden_size})
    if frame.latent is not None:
        check_kind("latent", frame.latent.kind, kind, "experts")
        check_same_dtype("latent", frame.latent, dtype, "experts")
    identity = check_count("num_identity_experts", frame.num_identity_experts, 0)
    bias = admit_factors("output_bias", frame.output_bias, {"hidden_size": hidden_size}, kind, "experts")
    return frame._replace(num_identity_experts=identity, output_bias=bias)
