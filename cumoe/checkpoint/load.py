"""The public face: which layers a checkpoint has, and one of them as a `MoE`."""

import logging
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cumoe.checkpoint.assemble import assemble
from cumoe.checkpoint.config import Config, read_config
from cumoe.checkpoint.families import FAMILIES
from cumoe.checkpoint.family import Family
from cumoe.checkpoint.files import Files
from cumoe.checkpoint.names import Names, layer_numbers, moe_layers
from cumoe.checkpoint.plan import LayerPlan, plan_layer
from cumoe.checkpoint.read import Progress, read
from cumoe.data.routing import GPU_MAX_EXPERTS
from cumoe.door.checks import check_count, check_word, one_of, refuse
from cumoe.gpu.compile import gpu_is_there
from cumoe.layer.module import MoE

log = logging.getLogger("cumoe")

Device = Literal["auto", "gpu", "cpu"]


class LayerShape(NamedTuple):
    """One Mixture-of-Experts layer of a checkpoint."""

    layer: int
    family: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    shared_intermediate_size: int  # 0 without shared experts
    dtype: str  # of the experts
    num_bytes: int  # of all tensors of the layer


def layers(path: str | os.PathLike[str]) -> list[LayerShape]:
    """List the Mixture-of-Experts layers of a checkpoint, without reading a weight.

    Parameters
    ----------
    path : path-like
        A folder in Hugging Face format: config.json and one or many safetensors files, with an index or without.

    Returns
    -------
    list of LayerShape
        In order; dense layers are left out.

    Raises
    ------
    FileNotFoundError, ImportError, TypeError, ValueError
        As `load` does, for any of the layers.

    Notes
    -----
    Reads config.json, the index and the headers of the files that hold experts.
    """
    checkpoint = _Checkpoint(path)
    return [_shape(plan) for plan in map(checkpoint.plan, checkpoint.moe_layers)]


def load(
    path: str | os.PathLike[str],
    layer: int,
    *,
    device: Device = "auto",
    dtype: Any = None,
    max_tokens: int = 0,
    progress: Progress = "bar",
) -> MoE:
    """Return one layer of a checkpoint, ready to run.

    Parameters
    ----------
    path : path-like
        A folder in Hugging Face format: config.json and one or many safetensors files, with an index or without.
    layer : int
        Its number in the model, from 0.
    device : {"auto", "gpu", "cpu"}
        Where the layer lives: "auto" is the current GPU if there is one. On the CPU tensors that lie as the layer needs
        them stay in the mapped file.
    dtype : dtype, optional
        float32 converts all weights, exactly. By default every tensor keeps the dtype that it has in the file.
    max_tokens : int
        As in `MoE`.
    progress : {"bar", "none"}
        A bar on stderr, if that is a terminal and tqdm is installed.

    Returns
    -------
    MoE
        With ``layer(x)`` what the model's own module gives for `x`: routed and shared experts, without the residual.
        For gemma4 `x` is the residual that router and experts normalise each in its own way. Layers that choose experts
        by token id (the first ones of deepseek_v4) want `input_ids`.

    Raises
    ------
    FileNotFoundError
        If the folder, config.json or a shard is missing.
    ImportError
        If safetensors is not installed.
    TypeError
        If a tensor has a dtype that no layer computes with, or not that of its neighbours.
    ValueError
        If the family is unknown, the layer is dense or not there, the checkpoint is quantised, a tensor is missing or
        of another shape than config.json says, a file is truncated or becomes so meanwhile, or a word is unknown.
    RuntimeError
        If device="gpu" and there is none.
    MemoryError
        If the device has no room for the layer.

    Notes
    -----
    Everything is checked before the first weight is read. Each byte of the layer's tensors is read once, by up to eight
    threads in pieces of 8 MiB; no other layer's bytes are touched. On the way to a GPU the host holds two pieces a
    thread, 128 MiB of pinned memory, and the call returns when all have arrived. On the CPU pieces are read into the
    arrays themselves. Matrices that a checkpoint stores transposed or interleaved stay so and are read through strides.
    """
    check_word("device", device, ("auto", "gpu", "cpu"))
    check_word("progress", progress, ("bar", "none"))
    widen = _wide_dtype(dtype)
    on_gpu = gpu_is_there() if device == "auto" else device == "gpu"
    if device == "gpu" and not gpu_is_there():
        raise RuntimeError(refuse("device", "a machine with a GPU for 'gpu'", "none"))
    checkpoint = _Checkpoint(path)
    plan = checkpoint.plan(check_count("layer", layer, 0))
    if on_gpu:
        choices = plan.num_experts + plan.num_identity_experts
        check_count("num_experts", choices, 1, GPU_MAX_EXPERTS, of=" on a GPU")
    arrays = read(checkpoint.files, plan.arrays, on_gpu, widen, progress)
    layer_read = assemble(plan, arrays, max_tokens)
    log.info("layer %d of %s: %s, %d bytes", layer, path, checkpoint.family_name, _shape(plan).num_bytes)
    return layer_read


def _wide_dtype(dtype: Any) -> np.dtype | None:
    if dtype is None:
        return None
    if np.dtype(dtype) != np.float32:
        raise ValueError(refuse("dtype", "None or float32, to which all convert exactly", repr(dtype)))
    return np.dtype(np.float32)


class _Checkpoint:
    """An opened checkpoint: its family, its files and its layers with experts."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        folder = Path(path)
        self.files = Files(folder)
        self.family_name, self.values = read_config(folder)
        if self.family_name not in FAMILIES:
            raise ValueError(refuse("model_type", one_of(sorted(FAMILIES)), repr(self.family_name)))
        self.family: Family = FAMILIES[self.family_name]
        self.num_layers = Config(self.values, 0).count("num_hidden_layers")
        marks = (*self.family.router, *(way.down for way in self.family.experts if "experts" in way.down))
        self.moe_layers: dict[int, Names] = moe_layers(self.files, self.family.blocks, marks, self.num_layers)

    def plan(self, layer: int) -> LayerPlan:
        """Return what a layer is made of; raise ValueError where it has no experts."""
        if layer not in self.moe_layers:
            there = layer_numbers(sorted(self.moe_layers)) or "none: no tensor is one of experts"
            known = self.num_layers is not None and layer >= self.num_layers
            what = f"{layer} of {self.num_layers} layers" if known else f"{layer}, which has no experts"
            raise ValueError(refuse("layer", f"one of the layers with experts ({there})", what))
        config = Config(self.values, layer)
        return plan_layer(self.family_name, self.family, config, self.moe_layers[layer])


def _shape(plan: LayerPlan) -> LayerShape:
    tensors = {copy.tensor.name: copy.tensor.num_bytes for array in plan.arrays.values() for copy in array.copies}
    return LayerShape(
        plan.config.layer,
        plan.family_name,
        plan.hidden_size,
        plan.arrays["experts.w_down"].viewed_shape[2],
        plan.num_experts,
        plan.router["top_k"],
        plan.arrays["shared.w_down"].viewed_shape[2] if plan.shared is not None else 0,
        plan.arrays["experts.w_down"].dtype.name,
        sum(tensors.values()),
    )
