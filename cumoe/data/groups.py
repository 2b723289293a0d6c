"""Groups: the order in which the experts read the tokens."""

from typing import Any, NamedTuple

import numpy as np

from cumoe.door.arrays import Kind, admit_like
from cumoe.door.checks import check_dtype, check_rank, check_shape, refuse

_INT32 = (np.dtype(np.int32),)


class Groups(NamedTuple):
    """Slots sorted by expert. A slot is ``token * top_k + j``; a sorted row is a place in that order."""

    permutation: Any  # (num_tokens * top_k,) int32: sorted row -> slot; slots without an expert come last
    expert_offsets: Any  # (num_experts + 1,) int32: first sorted row of each expert; last = slots that have an expert
    tokens_per_expert: Any  # (num_experts,) int32
    inverse_permutation: Any  # (num_tokens, top_k) int32: slot -> sorted row, -1 for a slot without an expert


def check_groups(groups: Any, kind: Kind, owner: str) -> Groups:
    """View the four arrays of a Groups; raise unless they are int32, of the given kind and of shapes that agree."""
    if not isinstance(groups, Groups):
        raise TypeError(refuse("groups", "a cumoe.Groups", type(groups).__name__))
    viewed = Groups(*(admit_like(name, array, kind, owner) for name, array in groups._asdict().items()))
    for name, array in viewed._asdict().items():
        check_dtype(name, array, _INT32)
        if not array.flags.c_contiguous:
            raise ValueError(refuse(name, "a contiguous array", f"strides {array.strides}"))
    check_rank("inverse_permutation", viewed.inverse_permutation, ("num_tokens", "top_k"))
    check_shape("permutation", viewed.permutation, {"num_tokens * top_k": viewed.inverse_permutation.size})
    check_rank("tokens_per_expert", viewed.tokens_per_expert, ("num_experts",))
    check_shape("expert_offsets", viewed.expert_offsets, {"num_experts + 1": viewed.tokens_per_expert.size + 1})
    return viewed
