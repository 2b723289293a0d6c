"""A layer on JAX arrays: needs jax.

    python -m cumoe.examples.jax_layer

Arrays are handed over through DLPack, so calls stand outside of jit; a result is a JAX array again.
"""

import jax
import jax.numpy as jnp

import cumoe


def by_einsum(x: jax.Array, routing: cumoe.Routing, w_gate_up: jax.Array, w_down: jax.Array) -> jax.Array:
    """Compute the same with all experts on all tokens, as JAX programs without a grouped product do."""
    gate, up = jnp.split(jnp.einsum("ad,eid->aei", x, w_gate_up), 2, axis=-1)
    every = jnp.einsum("aei,edi->aed", jax.nn.silu(gate) * up, w_down)
    chosen = jnp.take_along_axis(every, routing.topk_ids[:, :, None], axis=1)
    return (routing.topk_weights[:, :, None] * chosen).sum(1)


def main() -> None:
    """Compare with the dense computation."""
    a, D, I, E = 64, 128, 96, 8  # noqa: E741, N806 - as in the README
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (a, D))
    w_gate_up = jax.random.normal(keys[1], (E, 2 * I, D)) / D**0.5
    w_down = jax.random.normal(keys[2], (E, D, I)) / I**0.5
    logits = jax.random.normal(keys[3], (a, E))

    routing = cumoe.route(logits, cumoe.Router(top_k=2, renormalize=True))
    y = cumoe.moe(x, routing, cumoe.Experts(w_gate_up, w_down))

    assert isinstance(y, jax.Array)
    with jax.default_matmul_precision("highest"):
        expected = by_einsum(x, routing, w_gate_up, w_down)
    difference = float(jnp.abs(y - expected).max())
    assert difference < 1e-4, difference
    print(f"{a} tokens on {jax.default_backend()}; largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
