"""The model: the Llama decoder with window, strided, routed and full attention layers."""

from .llama import Block, Llama, WeightInit, create_llama

__all__ = ["Block", "Llama", "WeightInit", "create_llama"]
