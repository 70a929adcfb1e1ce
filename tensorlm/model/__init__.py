"""The model: the Llama decoder with window, strided, routed and full attention layers."""

from .initial_weights import WeightInit
from .llama import Block, Llama, create_llama
