"""What the demo prints."""

from collections.abc import Mapping

import numpy as np

from cumoe.cli.families import Family
from cumoe.cli.measure import Measurement

BAR_WIDTH = 40
MAX_BARS = 16


def print_pair(label: str, text: str) -> None:
    """Print one labelled line."""
    print(f"{label:<9} {text}")


def describe(family: Family) -> str:
    """Return the sizes of a layer in one line."""
    shared = ""
    if family.shared_size:
        shared = f", {'gated ' if family.shared_gate else ''}shared expert of {family.shared_size}"
    return (
        f"hidden {family.hidden_size}, {family.num_experts} experts of {family.intermediate_size}, "
        f"top {family.top_k}{shared}, weight on {family.weight_on}"
    )


def print_routing(tokens_per_expert: np.ndarray) -> None:
    """Print how the slots spread over the experts, a bar an expert; of many experts the busiest."""
    num_slots, num_experts = int(tokens_per_expert.sum()), tokens_per_expert.size
    mean, largest = num_slots / num_experts, int(tokens_per_expert.max())
    imbalance = f" ({largest / mean:.2f} x the mean)" if mean else ""
    spread = f"{num_slots} slots to {np.count_nonzero(tokens_per_expert)} of {num_experts} experts"
    print_pair("routing", f"{spread}; mean {mean:.1f}, most {largest}{imbalance}")
    shown = np.arange(num_experts)
    if num_experts > MAX_BARS:
        print(f"  the {MAX_BARS} busiest experts:")
        shown = np.argsort(-tokens_per_expert, kind="stable")[:MAX_BARS]
    for expert in shown:
        count = int(tokens_per_expert[expert])
        print(f"  expert {expert:>4} {count:>7}  {'#' * round(BAR_WIDTH * count / max(largest, 1))}")


def print_table(measured: Mapping[str, Measurement], errors: Mapping[str, float], operations: int) -> None:
    """Print a line a candidate: its time, its rate at so many floating-point operations, its memory and its error."""
    width = max(map(len, measured))
    print(f"{'':<{width}}  {'time':>10}  {'rate':>14}  {'extra memory':>12}  {'error':>8}")
    for name, (_, seconds, peak_bytes) in measured.items():
        rate = _rate(operations / seconds) if seconds > 0 else ""
        memory = f"{peak_bytes / 2**20:.1f} MiB"
        print(f"{name:<{width}}  {seconds * 1e3:>7.2f} ms  {rate:>14}  {memory:>12}  {errors[name]:>8.1e}")


def _rate(per_second: float) -> str:
    return f"{per_second / 1e12:.1f} TFLOP/s" if per_second > 1e12 else f"{per_second / 1e9:.1f} GFLOP/s"
