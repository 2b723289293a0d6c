"""Writing checkpoints in Hugging Face format from NumPy arrays, whole or broken."""

import json

import ml_dtypes
import numpy as np

from cumoe.checkpoint.files import DTYPES, INDEX, SINGLE

BF16 = np.dtype(ml_dtypes.bfloat16)
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def header_of(arrays, **changes):
    """Return the header of a safetensors file; `changes` replace entries by name."""
    entries, offset = {}, 0
    for name, array in arrays.items():
        entries[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    return entries | changes


def write_tensors(path, arrays, **changes):
    """Write one safetensors file; NumPy's own writer knows no bfloat16."""
    text = json.dumps(header_of(arrays, **changes)).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_checkpoint(folder, config, arrays, shards=0):
    """Write config.json and one file, or that many shards with an index; return the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if not shards:
        write_tensors(folder / SINGLE, arrays)
        return folder
    names = list(arrays)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard::shards]
        write_tensors(folder / file, {name: arrays[name] for name in mine})
        weight_map |= dict.fromkeys(mine, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 40, "intermediate_size": 24, "num_local_experts": 4,
    "num_experts_per_tok": 2, "num_hidden_layers": 3, "hidden_act": "silu",
}  # fmt: skip


def mixtral(rng, dtype=np.float32, layers=(0, 2), config=MIXTRAL):
    """Return the tensors of a tiny Mixtral whose other layers are dense."""
    hidden, width, experts = (config[key] for key in ("hidden_size", "intermediate_size", "num_local_experts"))

    def normal(*shape):
        return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(dtype)

    arrays = {"model.embed_tokens.weight": normal(32, hidden), "model.norm.weight": normal(hidden)}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}.block_sparse_moe"
        if layer not in layers:
            arrays[f"model.layers.{layer}.mlp.up_proj.weight"] = normal(width, hidden)
            continue
        arrays[f"{block}.gate.weight"] = normal(experts, hidden)
        for e in range(experts):
            for name, shape in {"w1": (width, hidden), "w2": (hidden, width), "w3": (width, hidden)}.items():
                arrays[f"{block}.experts.{e}.{name}.weight"] = normal(*shape)
    return arrays


def by_definition(arrays, x, layer=0, top_k=2):
    """Return what that layer computes, in float64, from its tensors."""
    block = f"model.layers.{layer}.block_sparse_moe"

    def weight(name):
        return arrays[f"{block}.{name}.weight"].astype(np.float64)

    x = x.astype(np.float64)
    logits = x @ weight("gate").T
    y = np.zeros(x.shape)
    for t, token in enumerate(x):
        ids = np.argsort(-logits[t])[:top_k]
        weights = np.exp(logits[t, ids] - logits[t, ids].max())
        for e, w in zip(ids, weights / weights.sum(), strict=True):
            gate, up = weight(f"experts.{e}.w1") @ token, weight(f"experts.{e}.w3") @ token
            y[t] += w * (weight(f"experts.{e}.w2") @ (gate / (1 + np.exp(-gate)) * up))
    return y
