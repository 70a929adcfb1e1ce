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

__all__ = [
    "Axis",
    "Backend",
    "Rotary",
    "apply_rotary",
    "document_reach",
    "fold_axes",
    "hop",
    "rotary_frequencies",
    "rotary_table",
    "tensor_attention",
    "validate_fold",
]
