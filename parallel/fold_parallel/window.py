"""Hop 1 on a shared row: each rank's tokens, with the halo of keys and values before them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tensor_attention import Backend, Rotary, hop, window_attention
from tensor_attention.api import check_operator

from .collectives import Halo, start_halo
from .grid import Grid


def sharded_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    grid: Grid,
    doc_start: Tensor | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`window_attention` of the whole row, for this rank's T/P tokens; any P that divides T.

    Collective over the sequence group; each rank passes its contiguous slice. The last window - 1
    keys and values of a slice are sent to the next rank, or to several ranks if slices are shorter.

    Args:
        q: [B, T/P, H, D], not rotated if `rotary` is given.
        k, v: [B, T/P, K, D], [B, T/P, K, E] with H a multiple of K.
        window: number of tokens that each token reads, including itself.
        grid: the rank grid; P is `grid.sp`.
        doc_start: [B, T/P] (or [1, T/P]), as in `sharded_tensor_attention`.
        rotary: table of at least T positions.
        scale, backend: as in `window_attention`.

    Returns:
        [B, T/P, H, E] in the dtype of v.

    Raises:
        ValueError: arguments do not match; raised before anything is sent.
    """
    if grid.sp == 1 or not q.numel():
        return window_attention(
            q, k, v, window=window, doc_start=doc_start, rotary=rotary, scale=scale, backend=backend
        )
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    seq_len = q.shape[1] * grid.sp
    doc_start = check_operator(q, k, v, (), doc_start, None, rotary, scale, backend, seq_len)
    assert grid.sp_group is not None
    window = min(window, seq_len)
    halo = start_halo((k, v), window - 1, grid.sp_group)
    depth = depth_in_document(doc_start, grid)
    return first_hop(q, k, v, depth, halo, window, grid, rotary, scale, backend)[0][:, window:]


def depth_in_document(doc_start: Tensor, grid: Grid) -> Tensor:
    """[B, T/P] int32: t - d(t), number of earlier tokens in each token's document."""
    shard = doc_start.shape[1]
    positions = torch.arange(shard, device=doc_start.device) + grid.sp_rank * shard
    return torch.minimum((positions - doc_start).clamp(min=0), positions).to(torch.int32)


def first_hop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    depth: Tensor,
    halo: Halo,
    length: int,
    grid: Grid,
    rotary: Rotary | None,
    scale: float | None,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Hop 1 of this rank's tokens, with the halo of tokens before them from its neighbors.

    `length` tokens are prepended: padding that is out of reach, then the halo. So if slices are
    multiples of `length`, blocks of `length` tokens are those of the whole row. The outputs of
    these tokens, the first of z and lse [B, length + T/P, ...], are not used.
    """
    before_k, before_v = halo.wait() or (k[:, :0], v[:, :0])  # empty for a window of one token
    k, v = _behind(k, before_k, length), _behind(v, before_v, length)
    q = torch.cat((q.new_zeros(q.shape[0], length, *q.shape[2:]), q), dim=1)
    reach = F.pad(depth, (length, 0))
    if rotary is not None:
        rotary = _table_from(rotary, grid.sp_rank * depth.shape[1] - length, q.shape[1])
    return hop(
        q, k, v, stride=1, length=length, reach=reach, rotary=rotary, scale=scale, backend=backend
    )


def _behind(x: Tensor, before: Tensor, length: int) -> Tensor:
    """Prepend `length` tokens to `x` [B, T/P, ...]: zeros, then the halo `before`."""
    front = length - before.shape[1]
    zeros = torch.zeros_like(x[:, :1]).expand(-1, front, *x.shape[2:])
    return torch.cat((zeros, before, x), dim=1)


def _table_from(rotary: Rotary, first: int, count: int) -> Rotary:
    """The table for positions first ... first + count - 1 of the row.

    Positions before the row (padding on rank 0) use position 0: their keys are zero and out of
    reach.
    """
    if first >= 0:
        return Rotary(*(x[first : first + count] for x in rotary))
    return Rotary(*(torch.cat((x[:1].expand(-first, -1), x[: first + count])) for x in rotary))
