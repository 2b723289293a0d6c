"""Stage 1: from router logits to the experts of every token and their weights."""

from typing import Any

from cumoe.cpu.route import route as cpu_route
from cumoe.data.routing import Router, Routing, admit_input_ids, check_logits
from cumoe.door.arrays import admit, give_back, on_device
from cumoe.door.checks import refuse
from cumoe.door.streams import on_producers_stream
from cumoe.gpu.captures import kept_by_results
from cumoe.gpu.route import route as gpu_route


@on_producers_stream
def route(router_logits: Any, router: Router, input_ids: Any = None) -> Routing:
    """Choose `top_k` experts a token and weigh them; the formula is in `Router`.

    Parameters
    ----------
    router_logits : (num_tokens, num_experts) array, float32, float16 or bfloat16
        Any strides. NumPy arrays are served on the CPU, CuPy arrays on the current stream; other DLPack exporters are
        viewed without a copy.
    router : Router
    input_ids : (num_tokens,) array of an int dtype
        What a router's `expert_table` is looked up with; for no other router.

    Returns
    -------
    Routing
        Arrays of the library that the logits came from.

    Raises
    ------
    TypeError
        If the logits or input_ids are no array, have another dtype, or live elsewhere than the router's arrays.
    ValueError
        If the rank is not 2, top_k > num_experts, the groups do not divide num_experts, the length of a router's array
        is not num_experts, num_tokens * top_k >= 2^31, num_experts > 1024 on a GPU, or there are input_ids without an
        expert_table or the other way round.

    See Also
    --------
    group : the next stage.

    Notes
    -----
    GPU: one launch, scores and weights in float32, nothing on the host waits, can be captured in a graph; the same bits
    on every run. A row with NaN logits gets distinct ids in range and NaN weights. In a capture each result keeps all
    memory that the graph uses.
    """
    if not isinstance(router, Router):
        raise TypeError(refuse("router", "a cumoe.Router", type(router).__name__))
    logits, kind = admit("router_logits", router_logits)
    check_logits("router_logits", logits, kind, router)
    with on_device(kind), kept_by_results(kind, logits, router, input_ids) as keep:
        ids = admit_input_ids(input_ids, router, kind, "router_logits", logits.shape[0])
        routing = gpu_route(logits, router, input_ids=ids) if kind.on_gpu else cpu_route(logits, router, ids)
    return Routing(*(give_back(keep(field), kind) for field in routing))
