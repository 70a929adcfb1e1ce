"""Fold-sharded sequence parallelism: tensorized attention over a row shared by several ranks."""

from .attention import sharded_tensor_attention
from .grid import Grid, check_sizes, check_world, create_grid, legal_degrees
from .traffic import Traffic, layer_traffic

__all__ = [
    "Grid",
    "Traffic",
    "check_sizes",
    "check_world",
    "create_grid",
    "layer_traffic",
    "legal_degrees",
    "sharded_tensor_attention",
]
