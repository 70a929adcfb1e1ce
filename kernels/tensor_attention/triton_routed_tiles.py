"""How the routed kernels are launched, measured on an H200 (`kernels/README.md` has the log)."""

from typing import NamedTuple

import torch

from .triton_launch import is_interpreted
from .triton_routed_launch import TILE, Routed


class Launch(NamedTuple):
    """Warps and pipeline stages of a kernel; `bulk` has TMA load its tiles."""

    warps: int
    stages: int
    bulk: bool


def forward_launch(routed: Routed) -> Launch:
    return _launch(routed, 3)


def backward_query_launch(routed: Routed) -> Launch:
    return _launch(routed, 2)


def backward_key_launch(routed: Routed) -> Launch:
    return _launch(routed, 2)


def _launch(routed: Routed, stages: int) -> Launch:
    if is_interpreted():
        return Launch(4, 1, routed.allows_bulk)
    wide = max(routed.q.shape[3], routed.values.shape[3])
    rows = TILE * routed.padded_group
    if routed.q.dtype == torch.float32 or wide > 128:
        return Launch(8 if rows > 64 else 4, 1, False)
    return Launch(8 if rows > 64 else 4, stages, routed.allows_bulk)
