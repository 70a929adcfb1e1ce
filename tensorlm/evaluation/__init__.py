"""Evaluation of checkpoints and Hugging Face folders on held-out text and prompts."""
