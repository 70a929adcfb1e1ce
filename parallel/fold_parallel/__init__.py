"""Fold-sharded sequence parallelism: tensorized attention over a row shared by several ranks."""

from .attention import (
    LocalAttention,
    forward_bytes_per_token,
    sharded_full_attention,
    sharded_tensor_attention,
)
from .grid import Grid, check_sizes, check_world, create_grid, legal_degrees

__all__ = [
    "Grid",
    "LocalAttention",
    "check_sizes",
    "check_world",
    "create_grid",
    "forward_bytes_per_token",
    "legal_degrees",
    "sharded_full_attention",
    "sharded_tensor_attention",
]
