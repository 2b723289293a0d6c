"""What a call of a layer launches and what that costs at best, from integers alone: no GPU is asked."""

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cumoe.data.routing import MAX_SLOTS
from cumoe.door.checks import check_count
from cumoe.gpu.compile import Note, gpu_of, rehearsed
from cumoe.gpu.config import Gpu
from cumoe.gpu.grouped_gemm import Work
from cumoe.gpu.layer_router import LayerRouter
from cumoe.gpu.stacks import ExpertStack
from cumoe.gpu.stand_in import StandIn
from cumoe.gpu.workspace import total_bytes

if TYPE_CHECKING:
    from cumoe.layer.module import MoE

STAGES = {
    "ends_rms_norm": "input norm",
    "router_gemm": "router",
    "route_and_group": "route, group",
    "route_and_count": "route",
    "group_place": "group",
    "shared_gate": "shared gate",
    "grouped_gemm": "experts",
    "combine": "combine",
    "ends_finish": "finish",
}
"""The beginning of a kernel's name, and what it does in a layer."""

SM_THREADS, SM_SHARED_BYTES, BLOCK_RESERVED_BYTES = 2048, 233_472, 1024
"""Of an SM of compute capability 9.0, and what each block takes of the second beside its own."""


class Roofs(NamedTuple):
    """What bounds a kernel. The defaults were measured on an H200: cuBLAS at 8192^3 in bfloat16, a read-only stream."""

    flops_per_s: float = 785e12
    bytes_per_s: float = 4.51e12


class Step(NamedTuple):
    """One launch."""

    stage: str
    kernel: str
    grid: int
    block: int
    shared_bytes: int  # dynamic, of a block
    tile: str  # token rows x weight rows, or ""
    units: int  # tiles of persistent blocks, at most, for any routing; else the blocks
    blocks_per_sm: int  # that threads and shared memory leave room for
    waves: float  # units over the blocks that run together
    num_bytes: int  # every operand once, of routed weights those of the experts that are expected to be hit
    flops: int
    us: float  # at the nearer roof
    roof: str  # "memory" or "compute"

    def line(self) -> str:
        """Return the line of the report."""
        return (
            f"{self.stage:<12} {self.kernel:<49} {self.grid:>6} {self.block:>5} {self.tile:>9} {self.units:>7}"
            f" {self.waves:>7.2f} {self.blocks_per_sm:>3} {self.shared_bytes:>7} {_amount(self.num_bytes):>8}"
            f" {_amount(self.flops):>8} {self.us:>8.1f} {self.roof:>7}"
        )


HEADER = (
    f"{'stage':<12} {'kernel':<49} {'grid':>6} {'block':>5} {'tile':>9} {'units':>7} {'waves':>7} {'/SM':>3}"
    f" {'shared':>7} {'bytes':>8} {'FLOP':>8} {'bound us':>8} {'roof':>7}"
)


class Plan(NamedTuple):
    """The launches of one call, in order; its text is a report.

    Attributes
    ----------
    steps : tuple of Step
    workspace_bytes : int
        Memory that the call needs besides its output.
    experts_hit : int
        Of the routed experts, if every token chose uniformly: ``E * (1 - (1 - top_k / E) ** num_tokens)``, rounded.
    """

    layer: str
    num_tokens: int
    num_slots: int
    num_experts: int
    experts_hit: int
    workspace_bytes: int
    gpu: Gpu
    roofs: Roofs
    steps: tuple[Step, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all launches."""
        return sum(step.num_bytes for step in self.steps)

    @property
    def flops(self) -> int:
        """Floating-point operations of all launches."""
        return sum(step.flops for step in self.steps)

    @property
    def us(self) -> float:
        """The least time of all launches one behind the other, without gaps."""
        return sum(step.us for step in self.steps)

    def __str__(self) -> str:
        """Return the report."""
        pairs = {
            "layer": self.layer,
            "tokens": f"{self.num_tokens}, {self.num_slots} slots",
            "experts": f"{self.experts_hit} of {self.num_experts} hit, if every token chooses uniformly",
            "GPU": f"{self.gpu.num_multiprocessors} SMs, {self.gpu.engine}",
            "roofs": f"{self.roofs.flops_per_s / 1e12:.0f} TFLOP/s, {self.roofs.bytes_per_s / 1e12:.2f} TB/s",
            "workspace": f"{self.workspace_bytes / 2**20:.2f} MiB",
            "in all": f"{_amount(self.num_bytes)}B, {_amount(self.flops)}FLOP, at least {self.us:.1f} us",
        }
        head = [f"{label:<12} {text}" for label, text in pairs.items()]
        return "\n".join((*head, "-" * len(HEADER), HEADER, *(step.line() for step in self.steps)))


def plan(layer: "MoE", num_tokens: int, gpu: Gpu | None = None, roofs: Roofs | None = None) -> Plan:
    """Return what `layer` launches for so many tokens; see `MoE.plan`."""
    top_k, num_experts = layer.router.top_k, layer.experts.num_experts
    check_count("num_tokens", num_tokens, 1, MAX_SLOTS // top_k)
    if gpu is None:
        gpu = gpu_of(layer.device_id) if layer.kind.on_gpu else Gpu()
    roofs = roofs or Roofs()
    hit = round(num_experts * (1 - (1 - min(1, top_k / layer.num_choices)) ** num_tokens))
    with rehearsed(gpu) as notes:
        buffers = _rehearse(layer, num_tokens)
    steps = tuple(_step(note, layer, num_tokens, hit, gpu, roofs) for note in notes)
    size = total_bytes(buffers)
    return Plan(repr(layer), num_tokens, num_tokens * top_k, num_experts, hit, size, gpu, roofs, steps)


def _rehearse(layer: "MoE", num_tokens: int) -> dict[str, Any]:
    """Go through the layer's own launch code on stand-ins; return its buffers."""
    playing = _stand_in(layer)
    buffers = playing.buffers(num_tokens)
    x, y = (StandIn((num_tokens, layer.hidden_size), layer.experts.dtype) for _ in range(2))
    logits = StandIn((num_tokens, layer.num_choices), np.float32) if layer.router_weight is None else None
    ids = StandIn((num_tokens,), np.int32) if layer.router.expert_table is not None else None
    playing.launch_all(x, logits, ids, None, y, {name: StandIn(*spec) for name, spec in buffers.items()})
    return buffers


def _stand_in(layer: "MoE") -> "MoE":
    """Return the layer with a stand-in for every array."""
    playing = object.__new__(type(layer))
    vars(playing).update(vars(layer))
    frame = layer.frame
    latent = _replaced(frame.latent, "w_in", "w_out", "b_in", "b_out")
    experts = copy(layer.experts)
    experts.weights = experts.weights.map(StandIn.of)
    router = _replaced(layer.router, "selection_bias", "expert_scale", "expert_table")
    vars(playing).update(
        experts=experts,
        shared=tuple(_shared(member) for member in layer.shared),
        router=router,
        frame=frame._replace(
            input_norm=_replaced(frame.input_norm, "weight"),
            latent=latent,
            output_bias=StandIn.of(frame.output_bias),
            output_norm=_replaced(frame.output_norm, "weight"),
        ),
        _gpu_router=_router(layer, router),
    )
    return playing


def _replaced(part: Any, *names: str) -> Any:
    if part is None:
        return None
    playing = copy(part)
    for name in names:
        object.__setattr__(playing, name, StandIn.of(getattr(part, name)))  # some are frozen
    return playing


def _shared(member: Any) -> Any:
    playing = _replaced(member, "gate")
    playing.weights = [weights.map(StandIn.of) for weights in member.weights]
    return playing


def _router(layer: "MoE", router: Any) -> LayerRouter:
    weight, bias = StandIn.of(layer.router_weight), StandIn.of(layer.router_bias)
    dtype = np.dtype(np.float32) if layer.frame.input_norm is not None else layer.experts.dtype
    return LayerRouter(router, weight, bias, dtype, layer.num_choices)


def _step(note: Note, layer: "MoE", num_tokens: int, hit: int, gpu: Gpu, roofs: Roofs) -> Step:
    name, work = note.kernel, note.work
    stage = next(stage for beginning, stage in STAGES.items() if name.startswith(beginning))
    num_bytes, flops = sum(array.nbytes for array in note.arrays), 0
    units, tile = note.grid, ""
    together = SM_SHARED_BYTES // (note.shared_bytes + BLOCK_RESERVED_BYTES)
    blocks_per_sm = max(1, min(SM_THREADS // note.block, together))
    if isinstance(work, Work):
        units, tile = work.tiles, work.config.name
        blocks_per_sm = work.config.blocks_per_sm
        flops = sum(2 * stack.num_rows * stack.w.shape[1] * stack.w.shape[2] for stack in work.stacks)
        num_bytes -= sum(_unread_bytes(stack, hit) for stack in work.stacks)
    elif stage == "router":
        flops = 2 * num_tokens * layer.num_choices * layer.hidden_size
    waves = units / min(units, gpu.num_multiprocessors * blocks_per_sm)
    times = {"memory": 1e6 * num_bytes / roofs.bytes_per_s, "compute": 1e6 * flops / roofs.flops_per_s}
    roof = max(times, key=times.__getitem__)
    return Step(
        stage, name, note.grid, note.block, note.shared_bytes, tile, units, blocks_per_sm, waves, num_bytes, flops,
        times[roof], roof,
    )  # fmt: skip


def _unread_bytes(stack: ExpertStack, hit: int) -> int:
    """Return the bytes of the weights and biases of routed experts that no token is expected to choose."""
    if stack.expert_offsets is None:
        return 0
    arrays: Sequence[Any] = [array for array in (stack.w, stack.bias) if array is not None]
    return sum(array.nbytes // _length(array) * (_length(array) - hit) for array in arrays)


def _length(array: Any) -> int:
    """Return the length of the first axis."""
    return int(array.shape[0])


def _amount(number: float) -> str:
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f} {prefix}"
    return f"{number:.0f} "
