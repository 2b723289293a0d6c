"""Whole layers and the arguments of their calls: a router of its own, gated shared experts, more around the experts."""

import numpy as np
from support import DTYPES, GPU, random_layer

import cumoe

HIDDEN, EXPERTS, TOP_K, VOCABULARY = 72, 6, 2, 50
PARTS = ("input_norm", "output_norm", "latent", "num_identity_experts", "output_bias")
NUM_IDENTITY = 3
COMBINATIONS = [
    (), *[(part,) for part in PARTS], ("input_norm", "output_norm"), ("latent", "output_bias", "output_norm"),
    ("input_norm", "num_identity_experts", "output_bias", "output_norm"), ("input_norm", "latent"),
]  # fmt: skip


def frame(rng, names, hidden_size, latent_size, dtype):
    """Return the named parts as arguments of NumPy arrays."""

    def normal(*shape, scale=1.0, like=np.float32):
        return (rng.standard_normal(shape) * scale).astype(like)

    def drawn(name):
        if name == "num_identity_experts":
            return np.int64(NUM_IDENTITY)  # a count may be a NumPy scalar
        if name == "output_bias":
            return normal(hidden_size)
        if name == "latent":
            return {
                "w_in": normal(latent_size, hidden_size, scale=hidden_size**-0.5, like=dtype),
                "w_out": normal(hidden_size, latent_size, scale=latent_size**-0.5, like=dtype),
                "b_in": normal(latent_size, scale=0.3),
                "b_out": normal(hidden_size, scale=0.3),
            }
        return {"weight": 1 + normal(hidden_size, scale=0.3), "eps": 1e-3}

    return {name: drawn(name) for name in names}


def on(backend, parts):
    """Return the parts as a layer takes them."""
    classes = {"latent": cumoe.Latent, "input_norm": cumoe.RMSNorm, "output_norm": cumoe.RMSNorm}

    def moved(value):
        return backend.asarray(value) if isinstance(value, np.ndarray) else value

    return {
        name: classes[name](**{k: moved(v) for k, v in part.items()}) if isinstance(part, dict) else moved(part)
        for name, part in parts.items()
    }


def build(dtype="bfloat16", names=(), with_table=False, seed=0, **options):
    """Return a layer on the GPU: gated shared experts, biases, a router of its own, and parts around the experts."""
    rng = np.random.default_rng(seed)
    latent = 24 if "latent" in names else HIDDEN
    inner = random_layer(rng, dtype, hidden_size=latent, num_experts=EXPERTS, biases=True)
    outer = random_layer(rng, dtype, hidden_size=HIDDEN, shared_sizes=(16, 40), gated_shared=True, biases=True)
    inner.shared = outer.shared
    _, _, experts, shared = inner.build(GPU)
    parts = on(GPU, frame(rng, names, HIDDEN, 24, DTYPES[dtype]))
    choices = EXPERTS + int(parts.get("num_identity_experts", 0))
    table = GPU.asarray(rng.integers(0, choices, (VOCABULARY, TOP_K)).astype(np.int32)) if with_table else None
    router = cumoe.Router(TOP_K, renormalize=True, expert_table=table)
    weight = GPU.asarray((rng.standard_normal((choices, HIDDEN)) * HIDDEN**-0.5).astype(DTYPES[dtype]))
    return cumoe.MoE(router, experts, shared, router_weight=weight, **parts, **options)


def draw(layer, seed, num_tokens=33, brought=()):
    """Return the arguments of a call on the GPU."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=layer.experts.dtype):
        return GPU.asarray(rng.standard_normal(shape).astype(dtype))

    arguments = {"x": normal(num_tokens, HIDDEN)}
    for name in brought:
        if name == "router_logits":
            arguments[name] = normal(num_tokens, layer.num_choices, dtype=np.float32)
        elif name == "input_ids":
            arguments[name] = GPU.asarray(rng.integers(-1, VOCABULARY, num_tokens).astype(np.int32))
        else:
            arguments[name] = normal(num_tokens, HIDDEN)
    if layer.router.expert_table is not None:
        arguments["input_ids"] = GPU.asarray(rng.integers(-1, VOCABULARY, num_tokens).astype(np.int32))
    return arguments


def bits(array):
    """Return the bytes of a CuPy array."""
    return GPU.asnumpy(array).tobytes()
