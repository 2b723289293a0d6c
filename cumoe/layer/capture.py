"""A layer ready to be replayed: one CUDA graph on buffers of its own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cumoe.data.routing import MAX_SLOTS
from cumoe.door.arrays import cupy, give_back, on_device
from cumoe.door.checks import check_count, check_word, refuse
from cumoe.gpu.workspace import Workspace

if TYPE_CHECKING:
    from cumoe.layer.module import MoE

INPUTS = ("router_logits", "input_ids", "residual")


class Captured:
    """A forward of a layer for a fixed number of tokens as a CUDA graph; made by `MoE.capture`.

    Calling it launches the graph on the current stream and returns `y`. Fill the inputs in place, on the same stream,
    before; read `y` behind, before the next call overwrites it. Tokens are routed anew at every replay.

    The object owns all that the graph touches: the layer with its weights, the buffers below, and a workspace; their
    memory comes from a pool of its own and goes back when the object and the buffers are gone, which waits for the GPU.

    Attributes
    ----------
    x : (num_tokens, hidden_size) array
        The tokens; zeros at first.
    y : (num_tokens, hidden_size) array
        The result of the last replay.
    router_logits : (num_tokens, num_experts) array, float32, or None
    input_ids : (num_tokens,) array, int32, or None
    residual : (num_tokens, hidden_size) array or None
    layer : MoE
    num_tokens : int

    Notes
    -----
    Arrays are of the layer's library. A replay allocates nothing, does not wait, and gives the bits of a plain call.
    Replays of one object come one behind the other on the GPU, whatever their streams; inputs and results of two
    streams have to be kept apart by the caller.
    """

    def __init__(self, layer: "MoE", num_tokens: int, inputs: Sequence[str] = ()) -> None:
        kind = layer.kind
        if not kind.on_gpu:
            raise ValueError(refuse("capture", "a layer on a GPU", str(kind)))
        self.num_tokens = check_count("num_tokens", num_tokens, 1, MAX_SLOTS // layer.router.top_k)
        wanted = _check_inputs(layer, inputs)
        self.layer, self._parts = layer, dict(vars(layer))  # also if the layer gets other parts later on
        width, dtype = layer.hidden_size, layer.experts.dtype
        specs: dict[str, tuple[tuple[int, ...], Any]] = {
            "router_logits": ((self.num_tokens, layer.num_choices), np.float32),
            "input_ids": ((self.num_tokens,), np.int32),
            "residual": ((self.num_tokens, width), dtype),
        }
        self._workspace, self._pool = Workspace(), cupy.cuda.MemoryPool()
        with on_device(kind), cupy.cuda.using_allocator(self._pool.malloc):
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream:
                x, y = (cupy.zeros((self.num_tokens, width), dtype) for _ in range(2))
                brought = [cupy.zeros(*specs[name]) if name in wanted else None for name in INPUTS]
                layer.forward_gpu(self._workspace, (x, *brought), y, y_is_new=False)  # loads kernels, takes memory
                stream.synchronize()
                stream.begin_capture()
                try:
                    layer.forward_gpu(self._workspace, (x, *brought), y, y_is_new=False)
                finally:
                    self._graph = stream.end_capture()
        self._launch = self._graph.launch
        self.x, self.y = give_back(x, kind), give_back(y, kind)
        self.router_logits, self.input_ids, self.residual = (
            None if array is None else give_back(array, kind) for array in brought
        )

    def __call__(self) -> Any:
        """Replay on the current stream.

        Returns
        -------
        (num_tokens, hidden_size) array
            `y`.
        """
        self._launch()
        return self.y

    @property
    def num_bytes(self) -> int:
        """GPU memory that the object holds: workspace and buffers, the weights not counted."""
        return int(self._pool.total_bytes())

    def __repr__(self) -> str:
        """Return the layer and the inputs."""
        inputs = [name for name in INPUTS if getattr(self, name) is not None]
        return f"Captured({self.layer!r}, num_tokens={self.num_tokens}, inputs={tuple(inputs)})"


def _check_inputs(layer: "MoE", inputs: Sequence[str]) -> set[str]:
    """Return the inputs besides x: those that are asked for, and those that the layer cannot do without."""
    if isinstance(inputs, str) or not isinstance(inputs, Sequence):
        raise TypeError(refuse("inputs", "a sequence of words", type(inputs).__name__))
    wanted = {check_word("inputs", word, INPUTS) for word in inputs}
    if layer.router.expert_table is not None:
        wanted.add("input_ids")
    elif "input_ids" in wanted:
        raise ValueError(refuse("inputs", "no input_ids, since the router has no expert_table", "'input_ids'"))
    return wanted if layer.router_weight is not None else wanted | {"router_logits"}
