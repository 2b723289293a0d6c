"""The command: ``python tests/fuzz --device cpu --cases 2000``."""

import argparse
import json
import multiprocessing
import os
import secrets
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # products are small: threads of BLAS would wait for each other

from fuzz.run import run_cases


def main(arguments: list[str] | None = None) -> int:
    """Check cases until all are checked or time is up; print seed and counts; return the number of breaches."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description="Random layers against a contract.")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--cases", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, help="of the cases; a new one without it")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this case alone, and what was drawn for it")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that share the cases")
    parser.add_argument("--small", action="store_true", help="small sizes alone")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the counts there, as JSON")
    parsed = parser.parse_args(arguments)
    seed = secrets.randbits(32) if parsed.seed is None else parsed.seed
    print(f"seed {seed}", flush=True)
    began = time.perf_counter()
    some = partial(run_cases, parsed.device, seed, seconds=parsed.seconds, largest=not parsed.small)
    if parsed.only is not None:
        done = [some([parsed.only], show=True)]
    elif parsed.jobs == 1:
        done = [some(range(parsed.cases))]
    else:
        shares = [range(first, parsed.cases, parsed.jobs) for first in range(parsed.jobs)]
        with ProcessPoolExecutor(parsed.jobs, multiprocessing.get_context("spawn")) as pool:
            done = list(pool.map(some, shares))
    seconds = time.perf_counter() - began
    where, count = done[0][0], sum((count for _, count, _ in done), Counter())
    breaches = [line for _, _, lines in done for line in lines]
    print("".join(line + "\n" for line in breaches), end="")
    print(", ".join(f"{number} {what}" for what, number in sorted(count.items())))
    print(f"seed {seed} on {where}: {count['cases']} cases hold, {len(breaches)} do not; {seconds:.0f} s")
    if parsed.record is not None:
        record = {"where": where, "seed": seed, "breaches": len(breaches), "seconds": round(seconds), "counts": count}
        parsed.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return len(breaches)


if __name__ == "__main__":
    sys.exit(main() > 0)
