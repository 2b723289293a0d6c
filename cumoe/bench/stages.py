"""What each stage of a layer takes on the GPU, alone and as part of the whole."""

from typing import Any, NamedTuple

import numpy as np

import cumoe
from cumoe.bench.draw import Weights, fill
from cumoe.bench.shapes import Shape
from cumoe.bench.timer import Run, Timer
from cumoe.door.arrays import cupy
from cumoe.gpu import combine, experts, group, route_and_group, router_gemm
from cumoe.gpu.workspace import layer_buffers

ROUTERS: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": {"num_groups": 8, "top_groups": 4, "renormalize_eps": 1e-20, "scale": 2.5},
}
"""What the routers of named layers have besides top_k, scoring and renormalize; with groups, a selection bias too."""

NOTHING = r'extern "C" __global__ void nothing() {}'


class StageTimes(NamedTuple):
    """Medians in us of graph replays."""

    layer: str
    tokens: int
    stage: str
    us: float  # with a cold L2 cache
    warm_us: float  # with what the replay before has left there

    def line(self) -> str:
        """Return the line that is printed below `HEADER`."""
        return f"{self.layer:<16}  {self.tokens:>6}  {self.stage:<14}  {self.us:>9.1f}  {self.warm_us:>9.1f}"


HEADER = f"{'layer':<16}  {'tokens':>6}  {'stage':<14}  {'cold':>9}  {'warm':>9}"


class Stages:
    """A layer at a number of tokens whose stages can be run one by one.

    ``nothing`` is an empty kernel: what a replay takes by itself. ``experts`` begins with clearing the counters that
    ``route + group`` clears in the layer. ``copy`` moves as many bytes as ``combine`` reads and writes. In ``layer``
    stages overlap.
    """

    def __init__(self, name: str, shape: Shape, weights: Weights, num_tokens: int) -> None:
        dtype = weights.experts.dtype
        more = dict(ROUTERS.get(name, {}))
        if more.get("num_groups"):
            bias = np.random.default_rng(0).normal(0, 0.1, shape.num_experts).astype(np.float32)
            more["selection_bias"] = cupy.asarray(bias)
        router = cumoe.Router(shape.top_k, shape.scoring, renormalize=shape.top_k > 1, **more)
        weight = fill(cupy, cupy.empty((shape.num_experts, shape.hidden_size), dtype), 9, shape.hidden_size**-0.5)
        self._shape, self._weights = shape, weights
        self._layer = cumoe.MoE(
            router, weights.experts, weights.shared, weight_on=shape.weight_on, router_weight=weight
        )
        self._x = fill(cupy, cupy.empty((num_tokens, shape.hidden_size), dtype), 4, 1.0)
        self.y = cupy.empty_like(self._x)
        wanted = layer_buffers(num_tokens, shape.top_k, weights.experts.weights, self._layer.shared)
        self._buffers = {name: cupy.zeros(*spec) for name, spec in (wanted | self._layer.buffers(num_tokens)).items()}
        self._nothing = cupy.RawKernel(NOTHING, "nothing")
        moved = self._buffers["rows"].nbytes + self._buffers["shared_rows"].nbytes + self.y.nbytes
        self._copied = fill(cupy, cupy.empty(moved // 4, np.float16), 5, 1.0)
        self._copy_of = cupy.empty_like(self._copied)
        self._router_gemm()
        self.routing, self.groups = self._route_and_group()

    def runs(self) -> dict[str, Run]:
        """Return the stages in order, then the layer."""
        return {
            "nothing": lambda: self._nothing((1,), (32,), ()),
            "router GEMM": self._router_gemm,
            "route + group": self._route_and_group,
            "group": lambda: group.group(self.routing.topk_ids, self._shape.num_experts, self._buffers),
            "experts": self._experts,
            "combine": self._combine,
            "copy": self._copy,
            "layer": lambda: self._layer(self._x, out=self.y),
        }

    @property
    def _router(self) -> Any:
        return self._layer._gpu_router

    def _router_gemm(self) -> None:
        buffers = self._buffers
        router_gemm.router_gemm(self._x, self._router.planes, buffers["router_logits"], buffers["blocks_done"])

    def _route_and_group(self) -> tuple[cumoe.Routing, cumoe.Groups]:
        buffers, router = self._buffers, self._layer.router
        return route_and_group.route_and_group(
            buffers["router_logits"], router, None, None, self._shape.num_experts, buffers, buffers["blocks_done"]
        )

    def _experts(self) -> None:
        progress = self._buffers["progress"]
        progress.data.memset_async(0, progress.nbytes)
        weights = self._weights.experts.weights
        experts.forward(
            self._x, self.routing, self.groups, weights, self._layer.shared, self._shape.weight_on, self._buffers
        )

    def _copy(self) -> None:
        self._copy_of.data.copy_from_device_async(self._copied.data, self._copied.nbytes)

    def _combine(self) -> None:
        rows, shared_rows = self._buffers["rows"], self._buffers["shared_rows"]
        combine.combine(rows, self.groups.inverse_permutation, None, shared_rows, self.y)


def stage_times(name: str, shape: Shape, weights: Weights, num_tokens: int, timer: Timer) -> list[StageTimes]:
    """Measure every stage of a layer, and the layer."""
    runs = Stages(name, shape, weights, num_tokens).runs()
    return [
        StageTimes(name, num_tokens, stage, timer.us(run), timer.us(run, cache="warm")) for stage, run in runs.items()
    ]
