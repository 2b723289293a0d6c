"""A part of the fuzz contract, that its truth is the definition, and that a breach is seen.

``python tests/fuzz --device cpu --cases 2000`` and ``--device gpu --cases 10000`` run more of it, with new seeds.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fuzz.contract import ContractError, check
from fuzz.draw import DISTRIBUTIONS, FORMS, View, draw
from fuzz.places import PLACES, Host
from fuzz.run import run_cases
from fuzz.truth import truth

import cumoe
from cumoe.data.routing import GPU_MAX_EXPERTS

TESTS = Path(__file__).resolve().parent
NUM_CASES = {"cpu": 300, "gpu": 1000}
ON_THE_CPU = 24  # of the CUDA sources: see test_cuda_on_cpu.py


def test_the_contract_holds(backend):
    """A fixed seed: 300 cases are 6 s on one core, 1000 on a GPU about as much."""
    num_cases = NUM_CASES[backend.name]
    stands_in = backend.name == "gpu" and not PLACES["gpu"]().streams
    _, count, breaches = run_cases(
        backend.name, 20, range(ON_THE_CPU if stands_in else num_cases), largest=not stands_in
    )
    assert not breaches, "\n".join(breaches)
    assert count["cases"] == (ON_THE_CPU if stands_in else num_cases)
    assert min(count["exact"], count["within a bound"]) > count["cases"] // 4
    assert count["with NaN or infinity confined"] > count["cases"] // 2
    assert count["runs with the same bits"] >= 3 * count["cases"]


@pytest.mark.parametrize("number", range(40))
def test_the_truth_is_the_definition(number):
    """The one that is fast, and the loop that defines a layer."""
    case = draw(7, number, largest=False)
    made = {name: part.array if isinstance(part, View) else part for name, part in case.experts.items()}
    shared = [
        cumoe.SharedExperts(**{name: part.array if isinstance(part, View) else part for name, part in parts.items()})
        for parts in case.shared
    ]
    defined = cumoe.reference.moe(
        case.x.array, case.routing(), cumoe.Experts(**made), shared, weight_on=case.weight_on,
        num_identity_experts=case.num_identity_experts, output_bias=case.output_bias,
    )  # fmt: skip
    np.testing.assert_allclose(truth(case).y, defined, rtol=1e-12, atol=1e-12)


def test_cases_are_what_they_say():
    """Every distribution, form and dtype comes up, in views that give the array back, with NaN between its elements."""
    cases = [draw(3, number) for number in range(400)]
    assert {case.options["distribution"] for case in cases if case.router is None} == set(DISTRIBUTIONS)
    assert {case.options["x_lies"] for case in cases} == set(FORMS)
    assert max(case.num_experts + case.num_identity_experts for case in cases) == GPU_MAX_EXPERTS
    assert {case.dtype.name for case in cases} == {"float32", "float16", "bfloat16"}
    for form in FORMS:
        array = np.arange(1, 25, dtype=np.float32).reshape(2, 3, 4)
        view = View.of(array, form)
        assert (view.array == array).all(), form
        assert np.isnan(view.storage).sum() == view.storage.size - array.size
        view.changed(lambda part: part.fill(0))
        assert (view.array == array).all()
    again = draw(3, 11)
    assert again.options == cases[11].options and again.x.storage.tobytes() == cases[11].x.storage.tobytes()


def spoiled_group(ids, num_experts, group):
    """Group with the last two slots exchanged, where they belong to different experts."""
    groups = group(ids, num_experts)
    if groups.permutation.size > 1:
        groups.permutation[-2:] = groups.permutation[-2:][::-1].copy()
    return groups


def unwritten_rows(rows, inverse, weights, shared, out, residual, combine):
    """Combine, but begin from what lies in memory."""
    combine(rows, inverse, weights, shared, out, residual)
    out[:1] += np.empty(out[:1].shape, np.float32).astype(out.dtype)


def multiplied_by_zero(rows, inverse, weights, shared, out, residual, combine):
    """Combine slots without an expert as rows times 0."""
    combine(rows, inverse, weights, shared, out, residual)
    missing = (inverse < 0).any(axis=1)
    if rows.size:
        out[missing] += (0 * rows[-1]).astype(out.dtype)


FAULTS = {
    "a row in another's place": ("cumoe.layer.moe.cpu_group", spoiled_group, "group"),
    "memory that nobody wrote": ("cumoe.layer.moe.cpu_combine", unwritten_rows, "combine"),
    "NaN times zero": ("cumoe.layer.moe.cpu_combine", multiplied_by_zero, "combine"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_breach_is_seen(monkeypatch, fault):
    """Layers that are wrong on purpose do not get through a hundred cases, and the report names case and seed."""
    place, wrong, name = FAULTS[fault]
    module, _, function = place.rpartition(".")
    right = getattr(sys.modules[module], function)
    monkeypatch.setattr(place, lambda *arguments: wrong(*arguments, **{name: right}))
    _, count, breaches = run_cases("cpu", 20, range(100), largest=False)
    assert len(breaches) > 5
    assert all(line.startswith("case ") and " of seed 20: ContractError: " in line for line in breaches)
    assert count["cases"] == 100 - len(breaches)


def test_inputs_that_change_and_bits_that_differ_are_seen(monkeypatch):
    """The two clauses that no wrong number shows."""
    case = draw(20, next(n for n in range(100) if draw(20, n).num_tokens > 2 and draw(20, n).router is None))
    right, calls = cumoe.moe, Counter()

    def noisy(x, *arguments, **options):
        calls["calls"] += 1
        y = right(x, *arguments, **options)
        y[0, 0] *= 1 + (calls["calls"] > 1)
        return y

    def writing(x, *arguments, **options):
        y = right(x, *arguments, **options)
        x[0, 0] += 1
        return y

    for wrong, clause in ((noisy, "not the same"), (writing, "not still")):
        monkeypatch.setattr(cumoe, "moe", wrong)
        with pytest.raises(ContractError, match=clause):
            check(case, Host(), 1, Counter())


def test_the_command_prints_seed_and_counts(tmp_path):
    """And writes them down; a seed gives the same cases."""
    record = tmp_path / "fuzz.json"
    done = subprocess.run(
        [sys.executable, TESTS / "fuzz", "--cases", "12", "--small", "--jobs", "2", "--record", record],
        capture_output=True, text=True, check=False, cwd=TESTS.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(record.read_text())
    assert done.stdout.startswith(f"seed {written['seed']}\n")
    assert written["counts"]["cases"] == 12 and written["breaches"] == 0
    assert f"seed {written['seed']} on CPU, NumPy {np.__version__}: 12 cases hold, 0 do not" in done.stdout
    _, count, _ = run_cases("cpu", written["seed"], range(12), largest=False)
    assert {name: number for name, number in count.items() if "bits" not in name} == {
        name: number for name, number in written["counts"].items() if "bits" not in name
    }
