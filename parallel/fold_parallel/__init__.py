"""Sequence parallelism: window, tensorized and routed attention on rows shared by several ranks.

Others call this context parallelism (CP).
"""

from .attention import sharded_tensor_attention
from .grid import Grid, check_sizes, check_world, create_grid, legal_degrees
from .routed import sharded_routed_attention
from .traffic import RoutedTraffic, Traffic, layer_traffic, routed_traffic
from .window import sharded_window_attention

__all__ = [
    "Grid",
    "RoutedTraffic",
    "Traffic",
    "check_sizes",
    "check_world",
    "create_grid",
    "layer_traffic",
    "legal_degrees",
    "routed_traffic",
    "sharded_routed_attention",
    "sharded_tensor_attention",
    "sharded_window_attention",
]
