"""Hugging Face: export checkpoints, import weights, and the code that exported folders carry."""

from tensorlm.hf.attach import attach

__all__ = ["attach"]
