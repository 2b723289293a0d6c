"""For programs that test their own code: strategies for hypothesis, tolerances, and an assert that explains.

`import cumoe` does not import this package; it needs hypothesis.
"""

from cumoe.testing.compare import FLOOR, TOLERANCE, assert_close, assert_routing, relative_error
from cumoe.testing.strategies import PATTERNS, Layer, arrays, layers, router_logits, routings

__all__ = [
    "FLOOR",
    "PATTERNS",
    "TOLERANCE",
    "Layer",
    "arrays",
    "assert_close",
    "assert_routing",
    "layers",
    "relative_error",
    "router_logits",
    "routings",
]
