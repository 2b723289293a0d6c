"""The layer: the function moe() and the object MoE."""
