"""Tile shapes of the Triton kernels, measured on an H100 (see `kernels/README.md`).

Unlike a search at run time, this small fixed table does not slow down the first step, and two runs
of a program agree in every bit.
"""

import math
from functools import cache
from typing import NamedTuple

import torch

from .launch import Hop, Tiles, is_interpreted, padded

# For windows above this many keys, rotating into a copy is faster than rotating on every load.
_REUSE = 256


class LineTiles(NamedTuple):
    """Rows of a tile of whole lines, and launch parameters of its kernel."""

    block: int
    warps: int
    stages: int


class RingTiles(NamedTuple):
    """Tiles of a warp-specialized kernel: keys per slot, slots of the ring, heads per tile."""

    block_n: int
    stages: int
    pack: int


@cache
def has_gluon() -> bool:
    """Whether this version of Triton supports the warp-specialized kernels (Gluon)."""
    try:
        from . import specialized  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def _supports_ring(hop: Hop) -> bool:
    """Whether the warp-specialized kernels support the hop.

    They support the shape of most large models on Hopper: bf16, heads of 128 with a rotary table,
    and groups of query heads whose size is a multiple of 4.
    """
    return (
        not is_interpreted()
        and hop.window > _REUSE
        and hop.bias is None
        and hop.cos is not None
        and hop.q.dtype == torch.bfloat16
        and (hop.q.shape[3], hop.values.shape[3]) == (128, 128)
        and hop.values.shape[2] == hop.k.shape[2]
        and hop.shared % 4 == 0
        and hop.allows_tma
        and torch.cuda.get_device_capability(hop.q.device)[0] == 9
        and has_gluon()
    )


def forward_ring(hop: Hop) -> RingTiles | None:
    """Tiles of the warp-specialized forward kernel; None if it does not support the hop."""
    return RingTiles(64, 5, 4) if _supports_ring(hop) else None


def backward_query_ring(hop: Hop) -> RingTiles | None:
    """Tiles of the warp-specialized kernel of dq; None if it does not support the hop."""
    return RingTiles(64, 5, 4) if _supports_ring(hop) else None


def forward_tiles(hop: Hop) -> Tiles:
    """Tiles of the forward kernel."""
    pack = _pack(hop)
    if is_interpreted():
        return Tiles(16 * pack, 16, 4, 1, pack, hop.window > 64, _uses_tma(hop, hop.window > 64))
    wide = padded(max(hop.q.shape[3], hop.values.shape[3]))
    reuse = hop.window > _REUSE
    if hop.q.dtype == torch.float32:
        return Tiles(64 if wide <= 128 else 32, 32 if wide <= 128 else 16, 4, 2, pack, reuse)
    if wide > 128:
        return Tiles(64, 32, 4, 2, pack, reuse)
    if reuse and hop.allows_tma:
        return Tiles(64, 64, 4, 3, min(pack, 4), reuse, tma=True)
    if reuse:  # measured: a tile of 4 heads is faster up to 64k rows, one of 2 heads above
        return Tiles(64, 64, 4, 3, min(pack, 4 if hop.rows <= 1 << 16 else 2), reuse)
    return Tiles(64, 64, 4, 1, min(pack, 2), reuse)


def backward_query_tiles(hop: Hop) -> Tiles:
    """Tiles of the backward kernel that owns queries."""
    pack = _pack(hop)
    if is_interpreted():
        return Tiles(16 * pack, 16, 4, 1, pack, hop.window > 64, _uses_tma(hop, hop.window > 64))
    wide = padded(max(hop.q.shape[3], hop.values.shape[3]))
    reuse = hop.window > _REUSE
    if hop.q.dtype == torch.float32:
        return Tiles(32, 32 if wide <= 128 else 16, 4, 1, pack, reuse)
    if wide > 128:
        return Tiles(64, 32, 4, 1, pack, reuse)
    if reuse and hop.allows_tma:
        return Tiles(64, 64, 4, 2, min(pack, 4), reuse, tma=True)
    if reuse:
        return Tiles(64, 64, 4, 2, 1, reuse)
    return Tiles(64, 32, 4, 1, 1, reuse)


def backward_key_tiles(hop: Hop) -> Tiles:
    """Tiles of the backward kernel that owns keys and values.

    block_n must be a multiple of the tokens (block_m / pack) of a query tile.
    """
    pack = _pack(hop)
    if is_interpreted():
        return Tiles(16, 32, 4, 1, pack, hop.window > 64, _uses_tma(hop, hop.window > 64))
    wide = padded(max(hop.q.shape[3], hop.values.shape[3]))
    reuse = hop.window > _REUSE
    if hop.q.dtype == torch.float32:
        return Tiles(32, 32, 4, 1, pack, reuse)
    if wide > 128:
        return Tiles(32, 64, 4, 1, pack, reuse)
    return Tiles(32, 64, 4, 2 if reuse else 1, pack, reuse, reuse and hop.allows_tma)


def forward_line_tiles(hop: Hop) -> LineTiles | None:
    """Tiles of the forward kernel for short lines; None if the general kernel is used."""
    values_are_state = hop.lse_before is None or hop.z_before is hop.values
    if hop.values.shape[2] != hop.q.shape[2] or not values_are_state:
        return None
    if is_interpreted():
        return LineTiles(16, 4, 1) if hop.steps <= 16 else None
    narrow = padded(max(hop.q.shape[3], hop.values.shape[3])) <= 128
    if hop.q.dtype == torch.float32 or not narrow or hop.steps > 128:
        return None
    return LineTiles(64, 4, 2) if hop.steps <= 64 else LineTiles(128, 8, 2)


def backward_line_tiles(hop: Hop) -> LineTiles | None:
    """Tiles of the backward kernel for short lines; None if the two general kernels are used."""
    if hop.values.shape[2] != hop.q.shape[2]:
        return None
    if is_interpreted():
        return LineTiles(16, 4, 1) if hop.steps <= 16 else None
    narrow = padded(max(hop.q.shape[3], hop.values.shape[3])) <= 128
    if hop.q.dtype == torch.float32 or not narrow or hop.steps > 64:
        return None
    return LineTiles(64, 4, 1)


def _uses_tma(hop: Hop, rotate_first: bool) -> bool:
    """Whether tiles can be loaded unchanged: already rotated, or without rotary embedding."""
    return hop.allows_tma and (rotate_first or hop.cos is None)


def _pack(hop: Hop) -> int:
    """Query heads per tile: the largest power of two up to 16 that divides the group."""
    return math.gcd(hop.shared, 16)
