"""Routed attention on a shared row: keys and values of the whole row, each rank's own queries.

A token may choose blocks anywhere in its past, so each layer gathers keys and values while hop 1
computes. Work per token is constant, so contiguous slices are balanced. The number of heads does
not limit P.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tensor_attention import Backend, Rotary, choose_blocks, routed_attention, routed_hop
from tensor_attention.api import check_operator
from tensor_attention.routed import Keep
from tensor_attention.routing import POOL, validate_route

from .collectives import start_gather, start_halo
from .grid import Grid
from .window import depth_in_document, first_hop


def sharded_routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    block: int,
    top_k: int,
    pool: int = POOL,
    stretch: int = 1,
    open_tile: int = 1,
    grid: Grid,
    doc_start: Tensor | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    keep: Keep | None = None,
) -> Tensor:
    """`routed_attention` of the whole row, for this rank's T/P tokens; any P that divides T.

    Collective over the sequence group; each rank passes its contiguous slice. With sp = 1 it calls
    `routed_attention` and communicates nothing. Blocks can cross the borders of slices, so their
    means are computed from the gathered keys, and are the same on all ranks.

    Args:
        q: [B, T/P, H, D], not rotated if `rotary` is given.
        k, v: [B, T/P, K, D], [B, T/P, K, E] with H a multiple of K.
        window, block, top_k, pool, stretch, open_tile: as in `routed_attention`.
        grid: the rank grid; P is `grid.sp`.
        doc_start: [B, T/P] (or [1, T/P]), as in `sharded_tensor_attention`.
        rotary: table of at least T positions.
        scale, backend, keep: as in `routed_attention`; `keep` keeps this rank's choice.

    Returns:
        [B, T/P, H, E] in the dtype of v.

    Raises:
        ValueError: arguments do not match; raised before anything is sent.
    """
    if grid.sp == 1 or not q.numel():
        return routed_attention(
            q, k, v, window=window, block=block, top_k=top_k, pool=pool, stretch=stretch,
            open_tile=open_tile, doc_start=doc_start, rotary=rotary, scale=scale, backend=backend,
            keep=keep,
        )  # fmt: skip
    validate_route(window, block, top_k, stretch, open_tile, pool)
    seq_len = q.shape[1] * grid.sp
    doc_start = check_operator(q, k, v, (), doc_start, None, rotary, scale, backend, seq_len)
    assert grid.sp_group is not None
    assert grid.swap_group is not None
    first, length = grid.sp_rank * q.shape[1], min(window, seq_len)

    # Start both exchanges before hop 1, and wait only for the halo.
    halo = start_halo((k, v), length - 1, grid.sp_group)
    starts = doc_start.long().clamp(0, seq_len).to(torch.int32)
    gather = start_gather((k, v, starts), grid.swap_group)
    depth = depth_in_document(doc_start, grid)
    z, lse = first_hop(q, k, v, depth, halo, length, grid, rotary, scale, backend)
    # In this order, backward sends the gradients of gathered keys before hop 1's backward begins.
    k, v, starts = gather.wait()

    def choose() -> Tensor:
        choice = choose_blocks(
            q, k, window=window, block=block, top_k=top_k, pool=pool, doc_start=starts,
            first=first, ordered=False, backend=backend,
        )  # fmt: skip
        return _with_earlier(choice, open_tile - 1, first, grid)

    choice = choose() if keep is None else keep(choose)
    state = (_Read.apply(z[:, length:], k, v), lse[:, length:])
    return routed_hop(
        q, k, v, choice, window=window, block=block, stretch=stretch, open_tile=open_tile,
        doc_start=starts, state=state, rotary=rotary, scale=scale, first=first, backend=backend,
    )[0]  # fmt: skip


class _Read(torch.autograd.Function):
    """Makes z depend on k and v, so that backward sends their gradients on every rank.

    Otherwise a rank whose tokens have nothing to read beyond their window would send none.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None, None]:
        return dz, None, None


def _with_earlier(choice: Tensor, count: int, first: int, grid: Grid) -> Tensor:
    """Prepend the choice of up to `count` tokens before this rank's to `choice` [B, T/P, K, C].

    This is needed because an open tile may begin on another rank.
    """
    assert grid.sp_group is not None
    landed = start_halo((choice,), count, grid.sp_group).wait()
    if not landed:
        return choice
    before = landed[0]
    return torch.cat((before[:, before.shape[1] - min(first, before.shape[1]) :], choice), dim=1)
