"""Tensorized and full attention on a row whose tokens are shared by the ranks of one group.

Each softmax is computed on one rank, so nothing is merged across ranks. `swap` describes the steps,
`traffic` the bytes sent per token and layer.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensor_attention import Rotary, fold_axes, hop, tensor_attention
from tensor_attention.api import Backend, check_operator

from . import swap
from .collectives import start_halo
from .grid import Grid, check_sizes
from .window import depth_in_document, first_hop


def sharded_tensor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fold: Sequence[int],
    *,
    grid: Grid,
    doc_start: Tensor | None = None,
    hop_bias: Tensor | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    overlap: bool = True,
) -> Tensor:
    """`tensor_attention` of the whole row (distance mode), for this rank's T/P tokens.

    Collective over the sequence group; each rank passes its contiguous slice. With sp = 1 it calls
    `tensor_attention` and communicates nothing. `hop_bias` must be the same on all ranks; its
    gradient is this rank's part of the sum.

    Args:
        q: [B, T/P, H, D], not rotated if `rotary` is given.
        k: [B, T/P, K, D] with H a multiple of K; neither needs to be a multiple of P.
        v: [B, T/P, K, E].
        fold: lengths of the inner axes, innermost first; [] is full attention, shared by heads.
        grid: the rank grid; P is `grid.sp`.
        doc_start: [B, T/P] integer (or [1, T/P] for all rows of the batch), index *in the whole
            row* of the first token of each token's document, clamped to 0 ... t; None: one document
            per row.
        hop_bias: [len(fold), H], added to the scores of hops 2, 3, ...
        rotary: table of at least T positions.
        scale: factor on the scores (default: 1 / sqrt(D)).
        backend: passed to `tensor_attention.hop`.
        overlap: False completes the swap of q and k before hop 1 begins, in both directions, to
            measure its cost.

    Returns:
        [B, T/P, H, E] in the dtype of v.

    Raises:
        ValueError: ranks cannot share such rows (`check_sizes`), or arguments do not match;
            raised before anything is sent.
    """
    if grid.sp == 1 or not q.numel():
        return tensor_attention(
            q, k, v, fold, doc_start=doc_start, hop_bias=hop_bias, rotary=rotary, scale=scale,
            backend=backend,
        )  # fmt: skip
    seq_len = q.shape[1] * grid.sp
    check_sizes(seq_len, grid.sp, fold, full_attention_heads=None if fold else q.shape[2])
    doc_start = check_operator(q, k, v, fold, doc_start, hop_bias, rotary, scale, backend, seq_len)
    if not fold:
        return _full_attention(q, k, v, doc_start, grid, rotary, scale, backend)
    assert grid.sp_group is not None
    assert grid.swap_group is not None
    depth = depth_in_document(doc_start, grid)

    # Start both exchanges before hop 1, and wait only for the halo.
    halo = start_halo((k, v), fold[0] - 1, grid.sp_group)
    swapping = swap.start_rows_to_columns((q, k, depth), fold[0], grid.swap_group)
    columns = None if overlap else swapping.wait()
    z, lse = first_hop(q, k, v, depth, halo, fold[0], grid, rotary, scale, backend)
    # In this order, backward sends the gradients of z first, and those of q, k during hop 1.
    q, k, depth = columns or swapping.wait()
    z, lse = swap.rows_to_columns((z, lse), fold[0], grid.swap_group, left_out=fold[0])
    for i, axis in enumerate(fold_axes(fold, seq_len)[1:]):
        z, lse = hop(
            q, k, z, stride=axis.stride // grid.sp, length=axis.length,
            reach=depth // axis.stride, state=(z, lse),
            bias=None if hop_bias is None else hop_bias[i],
            rotary=rotary, scale=scale, backend=backend,
        )  # fmt: skip
    (z,) = swap.columns_to_rows((z,), fold[0], grid.swap_group)
    return z


def _full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    doc_start: Tensor,
    grid: Grid,
    rotary: Rotary | None,
    scale: float | None,
    backend: Backend,
) -> Tensor:
    """Full attention: each rank attends over the whole row with H / P of the heads.

    Key heads are repeated until P divides their number, so P may exceed it.
    """
    assert grid.swap_group is not None
    repeats = math.lcm(k.shape[2], grid.sp) // k.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) if repeats > 1 else x for x in (k, v))
    doc_start = doc_start.long().clamp(0, doc_start.shape[1] * grid.sp).to(torch.int32)
    everywhere = doc_start[..., None].expand(-1, -1, grid.sp)
    q, k, v, doc_start = swap.tokens_to_heads((q, k, v, everywhere), grid.swap_group)
    out = tensor_attention(
        q, k, v, [], doc_start=doc_start[..., 0], rotary=rotary, scale=scale, backend=backend
    )
    (out,) = swap.heads_to_tokens((out,), grid.swap_group)
    return out
