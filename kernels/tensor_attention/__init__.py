"""Tensorized attention: fold the sequence into a tensor, attend along each axis."""

from .api import Backend, hop, tensor_attention
from .fold import (
    Axis,
    Rotary,
    apply_rotary,
    document_reach,
    fold_axes,
    rotary_frequencies,
    rotary_table,
    validate_fold,
)
from .routed import choose_blocks, routed_attention, routed_hop
from .window import window_attention

__all__ = [
    "Axis",
    "Backend",
    "Rotary",
    "apply_rotary",
    "choose_blocks",
    "document_reach",
    "fold_axes",
    "hop",
    "rotary_frequencies",
    "rotary_table",
    "routed_attention",
    "routed_hop",
    "tensor_attention",
    "validate_fold",
    "window_attention",
]
