"""Stage 2: from topk_ids to the order in which the experts read the tokens."""

from typing import Any

from cumoe.cpu.group import group as cpu_group
from cumoe.data.groups import Groups
from cumoe.data.routing import GPU_MAX_EXPERTS, as_int32_ids, check_ids
from cumoe.door.arrays import admit, give_back, on_device
from cumoe.door.checks import check_count
from cumoe.door.streams import on_producers_stream
from cumoe.gpu.captures import kept_by_results
from cumoe.gpu.group import group as gpu_group


@on_producers_stream
def group(topk_ids: Any, num_experts: int) -> Groups:
    """Sort the token slots by expert, stably.

    ::

        permutation = argsort(topk_ids.ravel(), stable)          ids outside [0, num_experts) sort last
        expert_offsets[e] = number of slots whose expert is < e

    Parameters
    ----------
    topk_ids : (num_tokens, top_k) array of integers
        Any strides. -1 and every other id outside ``[0, num_experts)`` is a slot without an expert. A row may name an
        expert twice.
    num_experts : int
        At least 1; at most 1024 on a GPU.

    Returns
    -------
    Groups
        Arrays of the library that `topk_ids` came from.

    Raises
    ------
    TypeError
        If `topk_ids` is no array of integers, or `num_experts` no int.
    ValueError
        If the rank is not 2, top_k is 0, num_tokens * top_k >= 2^31, or `num_experts` is out of range.

    See Also
    --------
    combine : reads the rows back in token order.

    Notes
    -----
    GPU: one launch up to 1024 slots, two above; current stream, no host synchronisation, can be captured in a graph,
    and then each result keeps all memory that the graph uses; no atomic decides a position.

    Examples
    --------
    >>> import numpy as np, cumoe
    >>> groups = cumoe.group(np.array([[1, 0], [1, 2]], np.int32), 3)
    >>> groups.expert_offsets
    array([0, 1, 3, 4], dtype=int32)
    >>> groups.permutation
    array([1, 0, 2, 3], dtype=int32)
    """
    ids, kind = admit("topk_ids", topk_ids)
    check_ids(ids)
    check_count("num_experts", num_experts, 1)
    if kind.on_gpu:
        check_count("num_experts", num_experts, 1, GPU_MAX_EXPERTS, of=" on a GPU")
    with on_device(kind), kept_by_results(kind, ids) as keep:
        groups = (gpu_group if kind.on_gpu else cpu_group)(as_int32_ids(ids), num_experts)
    return Groups(*(give_back(keep(field), kind) for field in groups))
