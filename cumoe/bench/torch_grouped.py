"""A baseline: the layer in torch, with ``torch._grouped_mm`` for the products and sorted copies of the tokens."""

import importlib
from typing import Any

import numpy as np

from cumoe.bench.problem import Problem
from cumoe.door.dlpack import Exported

ACTIVATIONS = ("silu", "relu2")


class TorchGrouped:
    """The layer as torch programs write it: sort, gather, two grouped products, scale, sum; dense shared experts."""

    def __init__(self, problem: Problem) -> None:
        self._torch: Any = importlib.import_module("torch")  # optional
        self._problem = problem
        self._x = self._view(problem.x)
        self._ids, self._factors = map(self._view, problem.routing)
        self._experts = self._matrices(problem.weights.experts.weights)
        shared = problem.weights.shared
        self._shared = [self._matrices(own) for own in shared.weights] if shared is not None else []
        self._gates = None if shared is None or shared.gate is None else self._view(shared.gate)

    def _view(self, array: Any) -> Any:
        """Return a tensor of the same memory."""
        return self._torch.from_dlpack(Exported(array) if isinstance(array, np.ndarray) else array)

    def _matrices(self, weights: Any) -> tuple[Any, Any]:
        return self._view(weights.w_gate_up), self._view(weights.w_down)

    @staticmethod
    def serves(problem: Problem) -> bool:
        """Whether this knows the layer: bfloat16, no biases, a known activation; and torch the GPU, if it is on one."""
        shape = problem.shape
        is_known = shape.activation in ACTIVATIONS and (shape.activation == "silu") == (shape.layout == "stacked")
        is_known = is_known and not shape.biases and problem.weight_on != "activation"
        if not is_known or problem.x.dtype.name != "bfloat16":
            return False
        torch: Any = importlib.import_module("torch")
        return hasattr(torch, "_grouped_mm") and (problem.xp is np or bool(torch.cuda.is_available()))

    def run(self) -> Any:
        """Compute the layer; return a new tensor."""
        torch, shape, x = self._torch, self._problem.shape, self._x
        num_tokens, hidden_size = x.shape
        on_input = self._problem.weight_on == "input"
        ids, order = torch.sort(self._ids.reshape(-1), stable=True)
        bounds = torch.arange(1, shape.num_experts + 1, device=x.device, dtype=ids.dtype)
        offsets = torch.searchsorted(ids, bounds).to(torch.int32)  # where each expert's rows end
        factors = self._factors.reshape(-1)[order, None]
        rows = x[order // shape.top_k]
        if on_input:
            rows = (rows * factors).to(x.dtype)
        w_gate_up, w_down = self._experts
        hidden = self._activate(torch._grouped_mm(rows, w_gate_up.transpose(1, 2), offs=offsets))
        rows = torch._grouped_mm(hidden, w_down.transpose(1, 2), offs=offsets)
        if not on_input:
            rows = rows * factors
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=x.device)
        y = rows[back].view(num_tokens, shape.top_k, hidden_size).sum(1).to(x.dtype)
        for s, (gate_up, down) in enumerate(self._shared):
            own = self._activate(x @ gate_up[0].T) @ down[0].T
            if self._gates is not None:
                own = own * torch.sigmoid(x @ self._gates[s])[:, None]
            y = y + own
        return y

    def _activate(self, hidden: Any) -> Any:
        functional = self._torch.nn.functional
        if self._problem.shape.activation == "relu2":
            return functional.relu(hidden).square()
        gate, up = hidden.chunk(2, dim=-1)
        return functional.silu(gate) * up
