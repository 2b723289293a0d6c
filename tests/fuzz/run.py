"""Checking many cases in one process."""

import time
import warnings
from collections import Counter
from collections.abc import Iterable

from fuzz.contract import check
from fuzz.draw import draw
from fuzz.places import PLACES


def run_cases(
    device: str, seed: int, numbers: Iterable[int], seconds: float = float("inf"), largest: bool = True,
    show: bool = False,
) -> tuple[str, Counter[str], list[str]]:  # fmt: skip
    """Return where the cases ran, counts of what was tried, and a line for every case that breaks the contract.

    A crash is a breach like any other, and so is a warning.
    """
    place, count, breaches = PLACES[device](), Counter[str](), []
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in numbers:
            if time.perf_counter() - began > seconds:
                break
            case = draw(seed, number, largest)
            if show:
                print(case.options)
            try:
                check(case, place, number, count)
            except Exception as error:  # noqa: BLE001 - all are reported
                breaches.append(f"case {number} of seed {seed}: {type(error).__name__}: {error}\n  {case.options}")
                continue
            count["tokens"] += case.num_tokens
            count[f"in {case.dtype.name}"] += 1
    return place.where, count, breaches
