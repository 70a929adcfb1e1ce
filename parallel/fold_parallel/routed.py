"""Routed attention over a shared row: keys and values of the whole row, each rank's own queries.

A token may choose blocks anywhere in its past, so keys and values are gathered, layer by layer,
while hop 1 computes. Work per token is constant: contiguous slices are balanced, and heads set no
limit.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tensor_attention import Backend, Rotary, choose_blocks, routed_attention, routed_hop
from tensor_attention.api import check_operator
from tensor_attention.routed import Keep
from tensor_attention.routing import validate_route

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
    stretch: int = 1,
    open_tile: int = 1,
    grid: Grid,
    doc_start: Tensor | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    keep: Keep | None = None,
) -> Tensor:
    """`routed_attention` of the whole row, this rank's T/P tokens of it; any P will do.

    All ranks of the sequence group call it together, each with its contiguous slice. With sp = 1 it
    is `routed_attention` and nothing is communicated. Means of blocks are taken from the gathered
    keys, since blocks cross the borders of slices, so all ranks have the means of one rank.

    Args:
        q: [B, T/P, H, D], not rotated when `rotary` is given.
        k, v: [B, T/P, K, D], [B, T/P, K, E] with H a multiple of K.
        window, block, top_k, stretch, open_tile: as in `routed_attention`.
        grid: the rank grid; P is `grid.sp`.
        doc_start: [B, T/P] (or [1, T/P]), as in `sharded_tensor_attention`.
        rotary: table of at least T positions.
        scale, backend, keep: as in `routed_attention`; what is kept is of this rank.

    Returns:
        [B, T/P, H, E] in the dtype of v.

    Raises:
        ValueError: arguments that do not belong together; before anything is sent.
    """
    if grid.sp == 1 or not q.numel():
        return routed_attention(
            q, k, v, window=window, block=block, top_k=top_k, stretch=stretch, open_tile=open_tile,
            doc_start=doc_start, rotary=rotary, scale=scale, backend=backend, keep=keep,
        )  # fmt: skip
    validate_route(window, block, top_k, stretch, open_tile)
    seq_len = q.shape[1] * grid.sp
    doc_start = check_operator(q, k, v, (), doc_start, None, rotary, scale, backend, seq_len)
    assert grid.sp_group is not None
    assert grid.swap_group is not None
    first, length = grid.sp_rank * q.shape[1], min(window, seq_len)

    # Both exchanges are under way before hop 1 starts; only the halo is waited for.
    halo = start_halo((k, v), length - 1, grid.sp_group)
    starts = doc_start.long().clamp(0, seq_len).to(torch.int32)
    gather = start_gather((k, v, starts), grid.swap_group)
    depth = depth_in_document(doc_start, grid)
    z, lse = first_hop(q, k, v, depth, halo, length, grid, rotary, scale, backend)
    # In this order, backward sends the gradients of the gathered keys before that of hop 1 begins.
    k, v, starts = gather.wait()

    def choose() -> Tensor:
        choice = choose_blocks(
            q, k, window=window, block=block, top_k=top_k, stretch=stretch, doc_start=starts,
            rotary=rotary, first=first, ordered=False, backend=backend,
        )  # fmt: skip
        return _with_earlier(choice, open_tile - 1, first, grid)

    choice = choose() if keep is None else keep(choose)
    state = (_Read.apply(z[:, length:], k, v), lse[:, length:])
    return routed_hop(
        q, k, v, choice, window=window, block=block, stretch=stretch, open_tile=open_tile,
        doc_start=starts, state=state, rotary=rotary, scale=scale, first=first, backend=backend,
    )[0]  # fmt: skip


class _Read(torch.autograd.Function):
    """z, which now depends on k and v: every rank sends their gradients to the others, also one
    whose tokens have nothing beyond their window to read.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None, None]:
        return dz, None, None


def _with_earlier(choice: Tensor, count: int, first: int, grid: Grid) -> Tensor:
    """The choice [B, T/P, K, C] behind that of up to `count` tokens before this rank's.

    A tile of tokens that share their blocks may begin on another rank.
    """
    assert grid.sp_group is not None
    landed = start_halo((choice,), count, grid.sp_group).wait()
    if not landed:
        return choice
    before = landed[0]
    return torch.cat((before[:, before.shape[1] - min(first, before.shape[1]) :], choice), dim=1)
