"""Grouping on NumPy arrays: one stable argsort."""

import numpy as np

from cumoe.data.groups import Groups


def group(ids: np.ndarray, num_experts: int) -> Groups:
    """Sort the slots; the definition is in `cumoe.group`."""
    bins = ids.ravel()
    bins = np.where((bins >= 0) & (bins < num_experts), bins, num_experts)
    permutation = np.argsort(bins, kind="stable").astype(np.int32)
    counts = np.bincount(bins, minlength=num_experts + 1)[:num_experts].astype(np.int32)
    expert_offsets = np.zeros(num_experts + 1, np.int32)
    np.cumsum(counts, out=expert_offsets[1:])
    inverse = np.full(bins.size, -1, np.int32)
    grouped = permutation[: expert_offsets[-1]]
    inverse[grouped] = np.arange(grouped.size, dtype=np.int32)
    return Groups(permutation, expert_offsets, counts, inverse.reshape(ids.shape))
