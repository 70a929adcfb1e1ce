"""Launch parameters of the routed kernels, measured on an H200 (see `kernels/README.md`)."""

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import is_interpreted, padded
from .routed_launch import TILE, Routed, can_tma
from .tiles import has_gluon


class Launch(NamedTuple):
    """Warps and pipeline stages of a kernel; `tma`: TMA loads its tiles."""

    warps: int
    stages: int
    tma: bool


def forward_launch(routed: Routed) -> Launch:
    return _launch(routed, 3)


def forward_stages(routed: Routed) -> int | None:
    """Slots of the warp-specialized forward kernel's ring; None if it does not support the hop."""
    return 5 if _supports_ring(routed) else None


def backward_query_stages(routed: Routed) -> int | None:
    """Slots of the warp-specialized kernel of dq; None if it does not support the hop."""
    return 4 if _supports_ring(routed) else None


def _supports_ring(routed: Routed) -> bool:
    """Whether the warp-specialized kernels support the hop: the shape of most large models."""
    return (
        not is_interpreted()
        and routed.allows_tma
        and _has_hopper(routed.q)
        and routed.q.dtype == torch.bfloat16
        and routed.cos is not None
        and (routed.q.shape[3], routed.values.shape[3]) == (128, 128)
        and (routed.group, routed.block) == (4, 64)
    )


def _has_hopper(x: Tensor) -> bool:
    """Whether the warp-specialized kernels run on the device of `x`."""
    return torch.cuda.get_device_capability(x.device)[0] == 9 and has_gluon()


def backward_query_launch(routed: Routed) -> Launch:
    return _launch(routed, 2)


def backward_key_launch(routed: Routed) -> Launch:
    return _launch(routed, 2)


def _launch(routed: Routed, stages: int) -> Launch:
    if is_interpreted():
        return Launch(4, 1, routed.allows_tma)
    wide = max(routed.q.shape[3], routed.values.shape[3])
    rows = TILE * routed.padded_group
    if routed.q.dtype == torch.float32 or wide > 128:
        return Launch(8 if rows > 64 else 4, 1, False)
    return Launch(8 if rows > 64 else 4, stages, routed.allows_tma)


def list_warps(routed: Routed) -> int:
    """Warps of the kernel that sorts the choices of a tile's tokens."""
    return 1 if routed.capacity <= 1024 else 4


class ChoiceLaunch(NamedTuple):
    """Tokens and slots per tile of scores, and launch parameters of the choice kernel."""

    tokens: int
    slots: int
    warps: int
    stages: int
    tma: bool


def choice_launch(q: Tensor, top_k: int) -> ChoiceLaunch:
    """Launch parameters; the bound of the choice needs more slots per tile than top_k."""
    tma = can_tma(q)
    if is_interpreted():
        return ChoiceLaunch(16, 16, 4, 1, tma)
    if q.dtype == torch.float32 or padded(q.shape[3]) > 128:
        return ChoiceLaunch(32, 32, 4, 1, False)
    return ChoiceLaunch(64, 64, 4, 3, tma) if top_k <= 32 else ChoiceLaunch(64, 128, 8, 2, tma)


def has_choice_ring(q: Tensor, top_k: int, parts: int) -> bool:
    """Whether the warp-specialized choice kernel supports the choice."""
    return (
        not is_interpreted()
        and can_tma(q)
        and _has_hopper(q)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] in (64, 128)
        and top_k <= 32
        and parts <= 4  # with 8, registers are spilled
    )
