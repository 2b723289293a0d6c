"""Tiny checkpoints of all families with what their modules compute: made where transformers is, compared anywhere.

    python tests/checkpoint_oracles.py make FOLDER                     needs transformers, no GPU
    python tests/checkpoint_oracles.py compare FOLDER --device gpu     needs the folder alone

The second prints the error of every loaded layer, in float32 and in bfloat16, against the module in float64; it returns
1 if one is too large. The folder holds a folder a model: float32/ and bfloat16/ as transformers saves them, and
module.npz with tokens and results.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from support import CPU, DTYPES, GPU, TOLERANCE, gpu_is_there, relative_error
from transformers_models import MODELS, Model, build, expected

import cumoe
from cumoe.testing import FLOOR

NUM_TOKENS = 13
MAX_IN_LAYER, MAX_ELSEWHERE = 50_000, 5_000
STORED = ("float32", "bfloat16")


def make(folder: Path, name: str, model: Model) -> None:
    """Write the checkpoints of one model and what its module computes.

    The weights and tokens are numbers that bfloat16 holds, so that both checkpoints have the same truth.
    """
    import torch

    built = build(model, name)
    sizes = {"max_shard_size": "20KB"} if len(name) % 2 else {}  # some whole, some with an index
    _save(built, model.layer, folder / "float32", **sizes)
    rounded = type(built).from_pretrained(folder / "float32", dtype=torch.bfloat16)
    _save(rounded, model.layer, folder / "bfloat16")
    rng = np.random.default_rng(5)
    x = rng.standard_normal((NUM_TOKENS, 72)).astype(ml_dtypes.bfloat16).astype(np.float32)
    ids = {"input_ids": rng.integers(0, 32, NUM_TOKENS)} if "hash" in name else {}
    y = expected(built, model, x, **ids)
    np.savez_compressed(folder / "module.npz", x=x, y=y, layer=model.layer, **ids)


def _save(built: Any, layer: int, folder: Path, **options: Any) -> None:
    """Save a model without what is large in it: attention and towers whose sizes are left at their defaults."""
    tensors = built.state_dict()
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.numel() <= (MAX_IN_LAYER if f".{layer}." in name else MAX_ELSEWHERE)
    }
    assert not any("expert" in name and f".{layer}." in name for name in tensors.keys() - kept.keys())
    built.save_pretrained(folder, state_dict=kept, **options)


def run(folder: Path, stored: str, backend: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return what cumoe computes with the checkpoint that is stored in a dtype, and what the module does."""
    module = np.load(folder / "module.npz")
    layer = cumoe.load(folder / stored, int(module["layer"]), device="cpu" if backend is CPU else "gpu")
    assert layer.experts.dtype == DTYPES[stored]
    ids = backend.asarray(module["input_ids"]) if "input_ids" in module else None
    y = layer(backend.asarray(module["x"].astype(layer.experts.dtype)), input_ids=ids)
    assert y.dtype == layer.experts.dtype
    return backend.asnumpy(y), module["y"]


def make_all(folder: Path) -> int:
    """Write all models; return 0."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, model in MODELS.items():
            make(folder / name, name, model)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{len(MODELS)} models of transformers {transformers.__version__} in {folder}, {size / 1e6:.1f} MB")
    return 0


def compare_all(folder: Path, backend: Any) -> int:
    """Print a line a model; return 1 if an error is above the tolerance of its dtype or there is no model, else 0."""
    names = sorted(path.parent.name for path in folder.glob("*/module.npz"))
    where = "the GPU" if backend is GPU else "the CPU"
    print(f"relative error on {where}; allowed {', '.join(f'{TOLERANCE[name]:.0e} in {name}' for name in STORED)}")
    width = max(map(len, names), default=0)
    wrong = not names
    for name in names:
        errors = {}
        for stored in STORED:
            got, wanted = run(folder / name, stored, backend)
            errors[stored] = relative_error(got, wanted, FLOOR[stored])
        bad = [stored for stored, error in errors.items() if not error < TOLERANCE[stored]]
        wrong = wrong or bool(bad)
        columns = [f"{error:8.1e}" for error in errors.values()] + [f"WRONG in {stored}" for stored in bad]
        print(f"{name:<{width}}", *columns)
    print(f"{len(names)} models: {'WRONG' if wrong else 'all right'}")
    return int(wrong)


def main() -> int:
    """Make or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("auto", "gpu", "cpu"), default="auto", help="a GPU if there is one")
    options = parser.parse_args()
    if options.command == "make":
        return make_all(options.folder)
    on_gpu = gpu_is_there() if options.device == "auto" else options.device == "gpu"
    return compare_all(options.folder, GPU if on_gpu else CPU)


if __name__ == "__main__":
    sys.exit(main())
