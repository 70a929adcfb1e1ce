"""Hugging Face: export checkpoints, import weights, and the code that exported folders carry."""
