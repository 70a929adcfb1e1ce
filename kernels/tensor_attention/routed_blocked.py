"""The routed axis in plain PyTorch, tile by tile: the CPU path, differentiable by autograd.

A tile of tokens reads the union of its tokens' blocks; a mask restricts each token to its own.
Scores for all slots are held for one tile at a time, and the hop recomputes a tile's scores in the
backward pass. Peak memory therefore grows with T (D + top_k), not with T x T. This file imports
only `fold` and `routing` from the project, because exported Hugging Face folders contain it.
"""

import itertools

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .fold import Rotary, State
from .routing import (
    best_blocks,
    block_scores,
    block_starts,
    pooled_keys,
    rotate_stretched,
    summed_queries,
)

# Finite, so that a token whose keys are all masked has a gradient of zero instead of NaN.
MASKED = -1e30
_TILE = 64  # tokens that share one product of the hop
_CHOICE_TILE = 512  # tokens whose scores for all slots are held at a time


def choose_blocks(
    q: Tensor,
    k: Tensor,
    *,
    window: int,
    block: int,
    top_k: int,
    pool: int,
    doc_start: Tensor,
    first: int = 0,
) -> Tensor:
    """Same as `routed.choose_blocks`."""
    work = torch.promote_types(q.dtype, torch.float32)
    starts = block_starts(doc_start, block)
    q = summed_queries(q, k.shape[2]).to(work)
    keys = pooled_keys(k, starts, block, pool).to(work)
    tiles = [
        best_blocks(
            block_scores(tile.transpose(1, 2), keys), starts, doc_start, at, window, block, top_k
        )
        for at, tile in _tiles(q, _CHOICE_TILE, first)
    ]
    return torch.cat(tiles, dim=1)


def hop(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    choice: Tensor,
    *,
    window: int,
    block: int,
    stretch: int,
    open_tile: int,
    doc_start: Tensor,
    state: State,
    rotary: Rotary | None,
    scale: float,
    first: int = 0,
) -> State:
    """Same as `routed.routed_hop`, but peak memory grows with T instead of T x T."""
    work = torch.promote_types(q.dtype, torch.float32)
    known = choice.shape[1]
    chosen = first + q.shape[1] - known  # first token of `choice`
    q = rotate_stretched(q, rotary, doc_start, stretch, first).to(work) * scale
    k = rotate_stretched(k, rotary, doc_start, stretch).to(work)
    v = values.to(work)
    document = doc_start[:, chosen : chosen + known, None, None].long()
    starts = torch.where(choice >= 0, document + choice * block, -1)
    z_before, lse_before = state[0].to(work), state[1].to(work)
    rows = []
    for row in range(q.shape[0]):
        tiles = []
        for at, q_tile in _tiles(q[row][None], _TILE, first):
            token = torch.arange(at, at + q_tile.shape[1], device=q.device)
            begin = _first_of_open_tile(token, doc_start[row], open_tile)
            opened = slice(int(begin.min()) - chosen, at + q_tile.shape[1] - chosen)
            heads = [
                _tile_hop(
                    q_tile[0].unflatten(1, (k.shape[2], -1))[:, head], k[row, :, head],
                    v[row, :, head], starts[row, opened, head], token, begin, window, block,
                )
                for head in range(k.shape[2])
            ]  # fmt: skip
            tiles.append(tuple(torch.cat(parts, dim=1) for parts in zip(*heads, strict=True)))
        rows.append(tuple(torch.cat(parts, dim=0) for parts in zip(*tiles, strict=True)))
    far_z, far_lse = (torch.stack(parts) for parts in zip(*rows, strict=True))
    lse = torch.logaddexp(lse_before, far_lse)
    keep, add = torch.exp(lse_before - lse)[..., None], torch.exp(far_lse - lse)[..., None]
    return (keep * z_before + add * far_z).to(values.dtype), lse


def _first_of_open_tile(token: Tensor, doc_start: Tensor, open_tile: int) -> Tensor:
    """[C]: the first token of each token's open tile."""
    document = doc_start[token].long()
    return document + (token - document) // open_tile * open_tile


def _tile_hop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    token: Tensor,
    begin: Tensor,
    window: int,
    block: int,
) -> State:
    """Softmax over the far keys of one tile and one key head, without the window.

    Args:
        q: [C, G, D], scaled.
        k: [T, D].
        v: [T, E].
        starts: [S, C'], first tokens of the blocks (-1: none) chosen by each token from the first
            of `begin` to the last of `token`.
        token: [C], indices of the queries in the row.
        begin: [C], first token of each query's open tile.
        window: tokens of the window.
        block: tokens per block.

    Returns:
        (z [C, G, E], lse [C, G]).
    """
    count = token.shape[0]
    source = token[-1] - torch.arange(starts.shape[0] - 1, -1, -1, device=q.device)
    union = torch.unique(starts)
    union = union[union >= 0]
    if union.numel() == 0:
        z = q.new_zeros(count, q.shape[1], v.shape[1])
        return z, q.new_full((count, q.shape[1]), MASKED)
    shares = (source[None] <= token[:, None]) & (source[None] >= begin[:, None])  # [C, S]
    holds = (starts[:, :, None] == union).any(1)  # [S, U]
    reads = shares.to(q.dtype) @ holds.to(q.dtype) > 0
    keys = (union[:, None] + torch.arange(block, device=q.device)).flatten()
    seen = reads.repeat_interleave(block, dim=1) & (keys <= token[:, None] - window)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return checkpoint(_attend, q, k, v, keys, seen, use_reentrant=False)
    return _attend(q, k, v, keys, seen)


def _attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, seen: Tensor) -> State:
    """Softmax attention of q [C, G, D] to the tokens of `keys` [U] that `seen` [C, U] marks."""
    scores = (q.flatten(0, 1) @ k[keys].T).unflatten(0, q.shape[:2])
    scores = scores.masked_fill(~seen[:, None], MASKED)
    largest = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - largest) * seen[:, None]
    total = weights.sum(-1)
    some = total > 0  # False for tokens without a far block
    total = torch.where(some, total, 1.0)
    lse = torch.where(some, largest[..., 0] + total.log(), MASKED)
    z = (weights.flatten(0, 1) @ v[keys]).unflatten(0, q.shape[:2])
    return z / total[..., None], lse


def _tiles(x: Tensor, size: int, first: int) -> list[tuple[int, Tensor]]:
    """Split `x` [B, Q, ...], a row's tokens from `first` on, at the row's multiples of `size`.

    Returns:
        (first token, part of `x`) of each part.
    """
    borders = [*range(first // size * size, first + x.shape[1], size), first + x.shape[1]]
    borders[0] = first
    return [(at, x[:, at - first : end - first]) for at, end in itertools.pairwise(borders)]
