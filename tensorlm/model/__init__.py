"""Rows become a loss: the Llama decoder with folded attention."""

from .llama import Block, Llama, WeightInit, create_llama

__all__ = ["Block", "Llama", "WeightInit", "create_llama"]
