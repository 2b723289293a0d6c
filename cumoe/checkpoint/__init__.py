"""Checkpoints in Hugging Face format: what is in them, and a layer of one as a `MoE`."""
