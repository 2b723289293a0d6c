"""Layers of real models: inputs, weights and outputs recorded from the modules of transformers.

A case is an .npz file whose `config` says how the family routes and activates. `Case` turns any such config into the
objects of cumoe and raises NotImplementedError at a field or an array that it does not know.
"""

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from support import DTYPES, assert_close

import cumoe


def config_of(path):
    """Return what a file says of its layer, or None."""
    with np.load(path) as file:
        return json.loads(str(file["config"])) if "config" in file.files else None


CONFIGS = {path: config_of(path) for path in sorted((Path(__file__).parent / "data").rglob("*.npz"))}

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu"}
ACTIVATIONS |= {"swish": "silu", "relu": "relu", "relu2": "relu2", "identity": "identity"}
CLAMPS = {None: "before", "pre": "before", "post": "after"}
SCORINGS = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "sqrt_softplus"}
SCORINGS |= {"sqrt_softplus": "sqrt_softplus"}
MASKS = {"-inf": "minus_inf", "0": "zero"}
EPS_MODES = {"none": "add", "add": "add", "clamp_min": "clamp"}
PLACES = {"expert_output": "output", "expert_input": "input"}
ROUTING_FIELDS = {
    "group_mask_value", "group_score", "kind", "logit_softcap", "n_group", "num_zero_experts", "renorm_eps",
    "renorm_eps_mode", "renorm_p", "renormalize", "routed_scaling_factor", "routed_scaling_on", "score_after_topk",
    "score_func", "selection_bias", "top_k", "topk_group", "weight_on",
}  # fmt: skip
ARRAYS = {
    "router_weight", "router_bias", "e_score_correction_bias", "expert_gate", "expert_up", "expert_down",
    "expert_gate_bias", "expert_up_bias", "expert_down_bias", "shared_gate", "shared_up", "shared_down",
    "shared_expert_gate", "x", "router_logits", "topk_ids", "topk_weights", "y", "y_routed", "y_shared", "output_bias",
    "router_x", "router_input_scale", "router_per_expert_scale",
}  # fmt: skip


def known(table, value, field):
    """Look a word up; raise NotImplementedError at an unknown one."""
    if value not in table:
        raise NotImplementedError(f"{field}={value!r}; known are {sorted(map(str, table))}")
    return table[value]


class Case:
    """One file: its arrays in NumPy, and the objects that its config describes."""

    def __init__(self, path):
        with np.load(path) as file:
            self.arrays = {name: array for name, array in file.items() if name != "config"}
        self.config = CONFIGS[path]
        self.routing, self.shared = self.config["routing"], self.config["shared"]
        unknown = {name for name, value in self.routing.items() if name not in ROUTING_FIELDS and value}
        unknown |= {name for name in self.arrays if name.split("_bf16")[0] not in ARRAYS}
        if unknown or self.routing.get("num_zero_experts") or (self.shared or {"kind": "mlp"})["kind"] != "mlp":
            raise NotImplementedError(f"{path.name}: {sorted(unknown)}, {self.routing}, shared {self.shared}")

    def __getitem__(self, name):
        """Return an array, or None."""
        return self.arrays.get(name)

    @cached_property
    def expected(self):
        """The layer's own output: `y` before a bias that the module adds, or an average that it takes."""
        y = self["y"].astype(np.float64)
        if self["output_bias"] is not None:
            y = y - self["output_bias"]
        combine = "sum" if self.shared is None else self.shared["combine"]
        return y * known({"sum": 1, "average": 2}, combine, "shared.combine")

    @property
    def weight_on(self):
        """The placement of the routing weights."""
        return known(PLACES, self.routing["weight_on"], "routing.weight_on")

    @property
    def output_scale(self):
        """A factor of the routed output that the recorded weights do not contain."""
        factors = {"weights": 1.0, "routed_output": self.routing["routed_scaling_factor"]}
        factor = known(factors, self.routing["routed_scaling_on"], "routing.routed_scaling_on")
        if factor != 1 and self.weight_on != "output":
            raise NotImplementedError("a factor of the routed output beside weights on the input")
        return factor

    @property
    def routed_weights(self):
        """The recorded weights, with everything that multiplies an expert's output."""
        return self["topk_weights"] * np.float32(self.output_scale)

    def router(self, backend):
        """Return the Router that the config describes."""
        r = self.routing
        known({"topk": None}, r["kind"], "routing.kind")
        groups = {}
        if r["n_group"] not in (None, 1):
            groups = {
                "num_groups": r["n_group"],
                "top_groups": r["topk_group"],
                "group_score": r["group_score"],
                "dropped_groups": known(MASKS, r["group_mask_value"], "routing.group_mask_value"),
            }
        return cumoe.Router(
            r["top_k"],
            known(SCORINGS, r["score_func"], "routing.score_func"),
            "logits" if r["score_after_topk"] else "scores",
            renormalize=r["renormalize"],
            renormalize_eps=0.0 if r["renorm_eps_mode"] == "none" else r["renorm_eps"],
            renormalize_eps_mode=known(EPS_MODES, r["renorm_eps_mode"], "routing.renorm_eps_mode"),
            renormalize_order=known({1.0: 1, 2.0: 2}, r["renorm_p"] or 1.0, "routing.renorm_p"),
            selection_bias=backend.asarray(self.arrays["e_score_correction_bias"]) if r["selection_bias"] else None,
            scale=r["routed_scaling_factor"],
            logit_softcap=r["logit_softcap"] or None,
            expert_scale=backend.asarray(self["router_per_expert_scale"]),
            **groups,
        )

    def weights(self, prefix, activation, backend, dtype, layout="stacked", transposed=False):
        """Return the arguments that Experts and SharedExperts have in common."""

        def joined(gate, up, axis):
            if up is None or not activation["gated"]:
                return up
            if layout == "interleaved":
                return np.stack([gate, up], axis + 1).reshape(*up.shape[:axis], -1, *up.shape[axis + 1 :])
            return np.concatenate([gate, up], axis)

        axis = self[f"{prefix}_up"].ndim - 2
        gate_up = joined(self[f"{prefix}_gate"], self[f"{prefix}_up"], axis).astype(dtype)
        down = self[f"{prefix}_down"].astype(dtype)
        if transposed:
            gate_up, down = (np.ascontiguousarray(w.swapaxes(-1, -2)).swapaxes(-1, -2) for w in (gate_up, down))
        return {
            "w_gate_up": backend.asarray(gate_up),
            "w_down": backend.asarray(down),
            "b_gate_up": backend.asarray(joined(self[f"{prefix}_gate_bias"], self[f"{prefix}_up_bias"], axis)),
            "b_down": backend.asarray(self[f"{prefix}_down_bias"]),
            "layout": layout if activation["gated"] else "ungated",
            "activation": cumoe.Activation(
                known(ACTIVATIONS, activation["name"], "activation.name"),
                alpha=activation["alpha"],
                limit=activation["limit"] or None,
                clamp=known(CLAMPS, activation["clamp"], "activation.clamp"),
                up_offset=activation["up_offset"],
            ),
        }

    def experts(self, backend, dtype, **options):
        """Return the routed experts."""
        return cumoe.Experts(**self.weights("expert", self.config["activation"], backend, dtype, **options))

    def shared_experts(self, backend, dtype, **options):
        """Return the shared experts, or None."""
        if self.shared is None:
            return None
        parts = self.weights("shared", self.shared["activation"], backend, dtype, **options)
        if known({None: False, "sigmoid": True}, self.shared["gate"], "shared.gate"):
            gate = self["shared_expert_gate"].astype(dtype)
            parts["gate"] = backend.asarray(gate[0] if parts["w_gate_up"].ndim == 2 else gate)
        return cumoe.SharedExperts(**parts)

    def run(self, backend, dtype, **options):
        """Compute the layer with the recorded routing; return a NumPy array."""
        routing = cumoe.Routing(backend.asarray(self["topk_ids"]), backend.asarray(self.routed_weights))
        experts, shared = self.experts(backend, dtype, **options), self.shared_experts(backend, dtype, **options)
        x = backend.asarray(self["x"].astype(dtype))
        return backend.asnumpy(cumoe.moe(x, routing, experts, shared, weight_on=self.weight_on))

    def run_routed(self, backend, dtype):
        """Let the layer route by itself; return a NumPy array."""
        weight = self["router_weight"]
        if (weight.astype(dtype).astype(np.float32) == weight).all():  # else it is kept in float32, as the families do
            weight = weight.astype(dtype)
        if len(weight) != len(self["expert_up"]):
            raise NotImplementedError("a router with more rows than experts")
        layer = cumoe.MoE(
            self.router(backend),
            self.experts(backend, dtype),
            self.shared_experts(backend, dtype),
            weight_on=self.weight_on,
            router_weight=backend.asarray(weight),
            router_bias=backend.asarray(self["router_bias"]),
        )
        logits = None if self["router_x"] is None else backend.asarray(self["router_logits"])
        return backend.asnumpy(layer(backend.asarray(self["x"].astype(dtype)), logits))


def cases(*dtypes):
    """Parametrize a test with the files recorded in one of `dtypes`."""
    paths = [path for path, config in CONFIGS.items() if config is not None and config["dtype"] in dtypes]
    assert paths, dtypes
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


@cases("float32", "bfloat16")
def test_router_chooses_what_the_model_chose(backend, path):
    """The same experts in every row, each with its weight."""
    case = Case(path)
    routing = cumoe.route(backend.asarray(case["router_logits"]), case.router(backend))
    ids, weights = backend.asnumpy(routing.topk_ids), backend.asnumpy(routing.topk_weights)
    order, recorded_order = np.argsort(ids, axis=1), np.argsort(case["topk_ids"], axis=1)
    recorded_ids = np.take_along_axis(case["topk_ids"], recorded_order, axis=1)
    recorded_weights = np.take_along_axis(case.routed_weights, recorded_order, axis=1)
    assert (np.take_along_axis(ids, order, axis=1) == recorded_ids).all()
    np.testing.assert_allclose(np.take_along_axis(weights, order, axis=1), recorded_weights, rtol=1e-5)


@cases("float32")
def test_experts_equal_the_model(backend, path):
    """With the recorded routing."""
    case = Case(path)
    assert_close(case.run(backend, np.float32), case.expected, np.float32)


@cases("float32")
def test_layer_equals_the_model(backend, path):
    """Routed by the layer itself."""
    case = Case(path)
    assert_close(case.run_routed(backend, np.float32), case.expected, np.float32)


@cases("bfloat16")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_layer_equals_the_model(backend, path, dtype):
    """On values that bfloat16 holds, a 16-bit layer that routes by itself stays near the float32 module."""
    case = Case(path)
    if dtype == "float16" and max(np.abs(array).max(initial=0) for array in case.arrays.values()) > 65504:
        pytest.skip("values beyond float16")
    assert_close(case.run_routed(backend, DTYPES[dtype]), case.expected, dtype)


@cases("float32", "bfloat16")
@pytest.mark.parametrize("layout", ["stacked", "interleaved"])
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_come_as_checkpoints_have_them(backend, path, layout, transposed):
    """Gate and up rows stacked or interleaved, each matrix straight or transposed: the same layer."""
    case = Case(path)
    dtype = DTYPES[case.config["dtype"]]
    y = case.run(backend, dtype, layout=layout, transposed=transposed)
    assert_close(y, case.expected, dtype)
    assert_close(y, case.run(backend, dtype).astype(np.float64), dtype)
