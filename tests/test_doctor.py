"""The doctor: it always prints, a line that is not fine names a cure, and the exit code says whether one has to act."""

import os
import subprocess
import sys
from argparse import Namespace
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest
from cuda_on_cpu import build
from support import gpu_is_there

from cumoe.cli.main import main
from cumoe.doctor import checks
from cumoe.doctor.asked import is_asked_for
from cumoe.doctor.checks import Examination, _numbers
from cumoe.doctor.child import ask
from cumoe.doctor.main import doctor, examine
from cumoe.doctor.nvidia import Driver, Gpu, ask_driver
from cumoe.gpu import sources
from cumoe.gpu.inventory import compile_one_unit, kernel_names

ROOT = Path(__file__).resolve().parent.parent
H200 = Driver((13, 0), "580.159", [Gpu("NVIDIA H200", (9, 0), 132, 141 << 30)], "")
KERNEL = {"name": "combine_float32_float32_1", "registers": 40, "local_bytes": 0, "shared_bytes": 16}


def run_doctor(folder, *arguments, **environment):
    """Run the command in a fresh interpreter in which modules of `folder` come first."""
    path = os.pathsep.join((str(folder), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "cumoe", "doctor", "--quick", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    for line, after in pairwise(lines):
        if line.startswith(("note", "FAIL")):
            assert after.split()[0] == "cure:", line
    return done.returncode, done.stdout


def without_driver(monkeypatch):
    def none():
        raise OSError("libcuda.so.1: cannot open")

    monkeypatch.setattr(checks, "ask_driver", none)


def findings(subject, **options):
    """Return the findings of one check."""
    return list(Examination(**{"gpu_is_wanted": False, "quick": True} | options).checks()[subject]())


def answers(monkeypatch, *given):
    """Let children answer so, one after the other."""
    left = list(given)
    monkeypatch.setattr(checks, "ask", lambda *_, **__: left.pop(0))


def test_whole_report(tmp_path):
    """On this machine, whatever it is: every subject has a line, and nothing fails."""
    code, text = run_doctor(tmp_path)
    assert code == 0, text
    subjects = {line[6:18].strip() for line in text.splitlines()}
    assert {"Python", "driver", "numpy", "ml_dtypes", "CuPy", "NVRTC", "headers", "cache", "sources"} <= subjects
    assert {"import", "kernels", "extras"} <= subjects
    assert "all that should work here does" in text


@pytest.mark.parametrize("body", ["raise ImportError('no such thing')", "import os; os._exit(139)"])
def test_a_broken_numpy_fails(body, tmp_path):
    """Also one that ends the interpreter; the rest is still examined."""
    (tmp_path / "numpy.py").write_text(body)
    code, text = run_doctor(tmp_path)
    assert code == 1
    assert "FAIL  numpy" in text and "FAIL  import" in text
    assert 'pip install "numpy>=2.1.2"' in text
    assert "ok    sources" in text and "extras" in text


@pytest.mark.parametrize("body", ["raise RuntimeError('driver of another world')", "import os; os._exit(139)"])
def test_a_broken_cupy_is_noted_on_a_machine_without_a_gpu(body, tmp_path):
    """NumPy arrays still run; with --gpu it is a failure."""
    if gpu_is_there():
        pytest.skip("a machine with a GPU")
    (tmp_path / "cupy.py").write_text(body)
    code, text = run_doctor(tmp_path)
    crashes = "_exit" in body  # cumoe itself imports CuPy, and nothing survives that
    assert code == crashes
    assert "note  CuPy" in text
    assert ("FAIL  import" in text) == crashes
    code, text = run_doctor(tmp_path, "--gpu")
    assert code == 1
    assert "FAIL  CuPy" in text


def test_a_cache_that_cannot_be_written(tmp_path):
    """A file stands where the folder should be."""
    (tmp_path / "file").write_text("")
    code, text = run_doctor(tmp_path, "--gpu", CUPY_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert code == 1
    assert "FAIL  cache" in text and "CUPY_CACHE_DIR" in text


def test_the_command_of_the_parser_is_the_same(monkeypatch, capsys):
    """`main` knows it too, for its help; a failure is exit code 1."""
    without_driver(monkeypatch)
    monkeypatch.setattr(Examination, "checks", lambda self: {"driver": self.nvidia})
    assert main(["doctor"]) == 0
    assert main(["doctor", "--gpu"]) == 1
    out = capsys.readouterr().out
    assert "note  driver" in out and "FAIL  driver" in out and "1 to mend" in out


def test_a_check_that_breaks_is_a_finding(monkeypatch, capsys):
    """And the others run all the same."""

    def broken(self):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(Examination, "python", broken)
    monkeypatch.setattr(Examination, "imports", lambda self: iter(()))
    assert doctor(Namespace(gpu=False, quick=True)) == 1
    out = capsys.readouterr().out
    assert "FAIL  Python       the check itself failed: ZeroDivisionError: oh" in out
    assert "sources" in out


@pytest.mark.parametrize(
    ("argv", "original", "asked"),
    [
        (["-m", "doctor"], ["python", "-m", "cumoe", "doctor"], True),
        (["-m", "doctor", "--quick"], ["python", "-W", "error", "-m", "cumoe", "doctor", "--quick"], True),
        (["-m", "doctor"], ["python", "-mcumoe", "doctor"], True),
        (["-m", "doctor"], ["python", "-m", "other", "doctor"], False),
        (["-m", "demo"], ["python", "-m", "cumoe", "demo"], False),
        (["/usr/bin/cumoe", "doctor"], ["python", "/usr/bin/cumoe", "doctor"], True),
        (["/usr/bin/other", "doctor"], ["python", "/usr/bin/other", "doctor"], False),
        (["/usr/bin/cumoe"], ["python", "/usr/bin/cumoe"], False),
        (["-c", "doctor"], ["python", "-c", "import cumoe", "doctor"], False),
        ([""], ["python"], False),
    ],
)
def test_when_the_package_stops_for_the_doctor(argv, original, asked):
    """In these two commands alone."""
    assert is_asked_for(argv, original) == asked


def test_children():
    """Answers, exceptions, endings and silence."""
    assert ask("answer['one'] = 1\nprint('noise')") == {"one": 1}
    assert ask("answer['one'] = 1\nraise KeyError('x')") == {"one": 1, "error": "KeyError: 'x'"}
    assert "ended with 3" in ask("import os\nos._exit(3)")["error"]
    assert "within 0.5 s" in ask("import time\ntime.sleep(60)", timeout=0.5)["error"]
    assert ask("import os\nanswer['v'] = os.environ['SOME']", environment={"SOME": "thing"}) == {"v": "thing"}


def test_no_driver(monkeypatch):
    """Something to know, unless a GPU was asked for."""
    without_driver(monkeypatch)
    (found,) = findings("driver")
    assert found.verdict == "note" and "libcuda" in found.text and found.cure
    assert findings("driver", gpu_is_wanted=True)[0].verdict == "FAIL"


@pytest.mark.parametrize(("capability", "verdict"), [((9, 0), "ok"), ((8, 0), "ok"), ((7, 5), "FAIL")])
def test_gpus(monkeypatch, capability, verdict):
    """Those before Ampere are not served."""
    gpu = Gpu("some GPU", capability, 80, 24 << 30)
    monkeypatch.setattr(checks, "ask_driver", lambda: Driver((12, 4), "", [gpu], ""))
    first, second = findings("driver")
    assert first.text == "for CUDA up to 12.4"
    assert second.verdict == verdict
    assert "24 GiB" in second.text


def test_a_driver_without_devices(monkeypatch):
    """What cuInit says."""
    monkeypatch.setattr(checks, "ask_driver", lambda: Driver((12, 4), "", [], "no device is visible"))
    assert [f.verdict for f in findings("driver")] == ["ok", "note"]


@pytest.mark.parametrize(
    ("installed", "answer", "verdict", "said"),
    [
        (["cupy-cuda12x"], {"version": "14.2.0", "available": True}, "ok", "14.2.0"),
        (["cupy-cuda12x"], {"version": "14.1.0", "available": True}, "FAIL", "not supported"),
        (["cupy-cuda12x"], {"version": "13.6.0", "available": True}, "FAIL", "not supported"),
        (["cupy-cuda11x"], {"version": "14.2.0", "available": False}, "FAIL", "sees no device"),
        (["cupy-cuda12x"], {"error": "OSError: x"}, "FAIL", "OSError: x"),
        ([], {"error": "ModuleNotFoundError"}, "FAIL", "not installed"),
        (["cupy-cuda12x", "cupy-cuda13x"], {"version": "14.2.0", "available": True}, "FAIL", "both"),
    ],
)
def test_cupy_packages_beside_a_gpu(monkeypatch, installed, answer, verdict, said):
    """One, of a version that works, that sees the device."""
    distributions = [type("D", (), {"metadata": {"Name": name}}) for name in [*installed, "numpy"]]
    monkeypatch.setattr(metadata, "distributions", lambda: distributions)
    answers(monkeypatch, answer)
    examination = Examination(gpu_is_wanted=False, quick=True)
    examination.driver = H200
    first = next(examination.cupy_package())
    assert first.verdict == verdict and said in first.text
    assert bool(first.cure) == (verdict != "ok")


@pytest.mark.parametrize(
    ("version", "driver", "verdict"), [([12, 9], H200, "ok"), ([12, 8], H200, "FAIL"), ([12, 8], None, "ok")]
)
def test_the_compiler_of_the_hopper_kernels(monkeypatch, version, driver, verdict):
    """An older one matters on Hopper alone."""
    answers(monkeypatch, {"seconds": 1.0, "unit": "gate", "headers": [12, 9]})
    examination = Examination(gpu_is_wanted=False, quick=True)
    examination.driver, examination.cupy = driver, {"nvrtc": version}
    nvrtc, headers = examination.compiler()
    assert nvrtc.verdict == verdict and headers.verdict == "ok"
    assert ("gate.cu compiled" in headers.text) == (driver is None)


def test_headers_beside_a_gpu(monkeypatch):
    """Where they are not found, CuPy may know others: the import tells."""
    answers(monkeypatch, {"headers": None})
    examination = Examination(gpu_is_wanted=False, quick=True)
    examination.driver, examination.cupy = H200, {"nvrtc": [12, 9]}
    _, headers = examination.compiler()
    assert headers.verdict == "note" and headers.cure


def test_no_compiler_and_no_headers(monkeypatch):
    """Both have the same cure."""
    examination = Examination(gpu_is_wanted=True, quick=True)
    examination.cupy = {"no_nvrtc": "DynamicLibNotFoundError: libnvrtc"}
    (found,) = examination.compiler()
    assert found.verdict == "FAIL" and "nvidia-cuda-nvrtc-cu12" in found.cure
    answers(monkeypatch, {"error": "RuntimeError: cannot open source file cuda_bf16.h"})
    examination.cupy = {"nvrtc": [12, 9]}
    _, headers = examination.compiler()
    assert headers.verdict == "FAIL" and "cuda_bf16.h" in headers.text


@pytest.mark.parametrize(
    ("answer", "verdict", "said"),
    [
        ({"seconds": 0.5, "kernels": [KERNEL, KERNEL]}, "ok", "2 compiled, 0 with"),
        ({"seconds": 0.5, "kernels": [KERNEL | {"local_bytes": 8}]}, "note", "1 with local memory (spills): combine"),
        ({"seconds": 0.5, "error": "RuntimeError: cumoe: they do not compile"}, "FAIL", "do not compile"),
    ],
)
def test_kernels(monkeypatch, answer, verdict, said):
    """Registers, spills and shared memory of each."""
    answers(monkeypatch, {"seconds": 24.0}, answer)
    examination = Examination(gpu_is_wanted=False, quick=False)
    examination.driver = H200
    imported, found, *each = examination.imports()
    assert imported.text == "cold 24.00 s (no bytecode, no kernels), warm 0.50 s"
    assert found.verdict == verdict and said in found.text
    assert len(each) == len(answer.get("kernels", ()))
    assert all("registers" in line.text for line in each)


def test_versions():
    """As packages write them."""
    assert _numbers("2.4.6") == (2, 4, 6)
    assert _numbers("14.0.1rc1") == (14, 0, 1)
    assert _numbers("2.5.0.dev0+1") == (2, 5, 0)
    assert _numbers("unknown") == ()


@pytest.mark.parametrize("unit", build.UNITS)
def test_names_of_the_kernels(unit, tmp_path):
    """Those that the C preprocessor finds."""
    if build.compiler() is None:
        pytest.skip("no g++")
    for path in sources.kernels_directory().glob("*.cu*"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "ptx.cuh").write_text((build.HERE / "ptx.cuh").read_text(encoding="utf-8"), encoding="utf-8")
    assert kernel_names(unit) == tuple(match["name"] for match in build.kernels_of(unit, tmp_path))


def test_the_trial_compiles():
    """With the compiler and the headers that came with the package."""
    found = compile_one_unit()
    assert found["unit"] == "gate"
    assert found["headers"] >= (12, 0)


def test_every_finding_that_is_not_fine_has_a_cure():
    """On this machine."""
    for found in examine(Examination(gpu_is_wanted=True, quick=True)):
        assert bool(found.cure) == (found.verdict != "ok"), found


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    """The kernels are counted, and none spills."""
    if not gpu_is_there():
        pytest.skip("no CUDA device")
    assert ask_driver().gpus
    code, text = run_doctor(tmp_path, "--gpu")
    assert code == 0, text
    assert "0 with local memory" in text
    assert "combine_float32_float32_1" in text
