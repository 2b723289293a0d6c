"""The non-linearity between the two projections of an expert."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cumoe.door.checks import check_number, check_word, refuse

NAMES = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
CLAMPS = ("before", "after")


@dataclass(frozen=True)
class Activation:
    r"""``h = phi(gate) * (up + up_offset)``, or ``h = phi(v)`` where an expert is not gated.

    ==========  ==========================================
    name        phi(g)
    ==========  ==========================================
    silu        g * sigmoid(alpha * g)
    gelu        g * (1 + erf(g / sqrt 2)) / 2
    gelu_tanh   g * (1 + tanh(sqrt(2/pi) * (g + 0.044715 g^3))) / 2
    relu        max(g, 0)
    relu2       max(g, 0)^2
    identity    g
    ==========  ==========================================

    With a `limit` L, ``up`` becomes ``clip(up, -L, L)`` and the gate is clamped from above, either before phi
    (``phi(min(g, L))``: gpt-oss, DeepSeek-V4) or after it (``min(phi(g), L)``: Step-3.7).

    Parameters
    ----------
    name : {"silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"}
    alpha : float
        Slope inside the sigmoid of silu; 1.702 for gpt-oss. Other activations do not use it.
    limit : float or None
        L above, positive; None does not clamp.
    clamp : {"before", "after"}
    up_offset : float
        1 for gpt-oss.

    Raises
    ------
    TypeError, ValueError
        If a word is unknown or a number is not finite, or `limit` is not positive.
    """

    name: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"] = "silu"
    alpha: float = 1.0
    limit: float | None = None
    clamp: Literal["before", "after"] = "before"
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        """Check the words and numbers."""
        check_word("activation", self.name, NAMES)
        object.__setattr__(self, "alpha", check_number("alpha", self.alpha))
        check_word("clamp", self.clamp, CLAMPS)
        object.__setattr__(self, "up_offset", check_number("up_offset", self.up_offset))
        if self.limit is not None:
            object.__setattr__(self, "limit", check_number("limit", self.limit, low=0.0, low_is_allowed=False))

    def apply(self, gate: np.ndarray, up: np.ndarray | None = None) -> np.ndarray:
        """Evaluate on NumPy arrays, in their dtype; `up` is None where an expert is not gated."""
        if self.limit is not None and self.clamp == "before":
            gate = np.minimum(gate, self.limit)
        with np.errstate(over="ignore", invalid="ignore"):  # exp(-g) = inf is the right answer: sigmoid 0
            h = self._phi(gate)
        if self.limit is not None and self.clamp == "after":
            h = np.minimum(h, self.limit)
        if up is None:
            return h
        if self.limit is not None:
            up = np.clip(up, -self.limit, self.limit)
        return h * (up + gate.dtype.type(self.up_offset))

    def _phi(self, g: np.ndarray) -> np.ndarray:
        real = g.dtype.type
        if self.name == "silu":
            return g / (real(1) + np.exp(real(-self.alpha) * g))
        if self.name == "gelu":  # erfc keeps the relative accuracy of the negative tail
            tail = map(math.erfc, (g.astype(np.float64) * -math.sqrt(0.5)).ravel())
            return real(0.5) * g * np.fromiter(tail, np.float64, g.size).reshape(g.shape).astype(g.dtype)
        if self.name == "gelu_tanh":
            inner = real(math.sqrt(2 / math.pi)) * (g + real(0.044715) * g * g * g)
            return real(0.5) * g * (real(1) + np.tanh(inner))
        if self.name == "identity":
            return g
        h = np.maximum(g, real(0))
        return h * h if self.name == "relu2" else h


GPT_OSS = Activation("silu", alpha=1.702, limit=7.0, up_offset=1.0)
"""The gated activation of gpt-oss: (up + 1) * gate * sigmoid(1.702 gate), both clamped at 7."""


def as_activation(value: str | Activation) -> Activation:
    """Return the Activation that a word or an Activation stands for; ``"gpt_oss"`` is `GPT_OSS`."""
    if isinstance(value, Activation):
        return value
    if not isinstance(value, str):
        raise TypeError(refuse("activation", "a word or a cumoe.Activation", type(value).__name__))
    return GPT_OSS if value == "gpt_oss" else Activation(check_word("activation", value, (*NAMES, "gpt_oss")))  # type: ignore[arg-type]
