"""The definition of the routed axis, T x T, in any dtype: the reference for its implementations.

Shape letters: B batch, T tokens, H query heads, K key/value heads, D head size, E value size,
N slots (`routing.py`), C = top_k + 1 blocks of a choice, Q queries from token `first` on.
"""

import torch
from torch import Tensor

from .fold import Rotary, State
from .routing import best_blocks, block_starts, pooled_keys, rotate_stretched, summed_queries


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
    q, keys = summed_queries(q, k.shape[2]), pooled_keys(k, starts, block, pool)
    scores = torch.einsum("btkd,bnpkd->bktnp", q.to(work), keys.to(work)).amax(-1)
    return best_blocks(scores, starts, doc_start, first, window, block, top_k)


def opened_blocks(
    choice: Tensor, doc_start: Tensor, block: int, open_tile: int, first: int, queries: int
) -> Tensor:
    """[B, K, Q, N] bool: the slots open to each query.

    These are the query's own choice and the choices of earlier tokens of its tile.

    Args:
        choice: [B, P + Q, K, C] of the queries and the P tokens before them.
        doc_start: [B, T].
        block: tokens per block.
        open_tile: tokens per tile, counted from the document's start.
        first: index in the row of the first query.
        queries: Q.
    """
    batch, known, num_key_heads, _ = choice.shape
    num_slots = -(-doc_start.shape[1] // block)
    position = torch.arange(first + queries - known, first + queries, device=choice.device)
    document = doc_start[:, first + queries - known : first + queries].long()
    slot = (document // block)[:, :, None, None] + choice
    chosen = torch.zeros(batch, known, num_key_heads, num_slots + 1, device=choice.device)
    chosen.scatter_(3, torch.where(choice >= 0, slot, num_slots), 1.0)
    chosen = chosen[..., :num_slots].permute(0, 2, 1, 3)
    tile = (position - document) // open_tile
    same = (tile[:, :, None] == tile[:, None, :]) & (document[:, :, None] == document[:, None, :])
    same = (same & (position[:, None] >= position[None, :]))[:, known - queries :]
    return same[:, None].float() @ chosen > 0


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
    """Same as `routed.routed_hop`."""
    queries, num_heads = q.shape[1:3]
    num_tokens = k.shape[1]
    group = num_heads // k.shape[2]
    work = torch.promote_types(q.dtype, torch.float32)
    q = rotate_stretched(q, rotary, doc_start, stretch, first).to(work)
    k = rotate_stretched(k, rotary, doc_start, stretch).to(work).repeat_interleave(group, dim=2)
    v = values.to(work).repeat_interleave(group, dim=2)
    scores = torch.einsum("bthd,buhd->bhtu", q, k) * scale

    position = torch.arange(num_tokens, device=q.device)
    document = doc_start.long()
    slot = document // block + (position - document) // block  # [B, T], of each key
    query = slice(first, first + queries)
    opened = opened_blocks(choice, doc_start, block, open_tile, first, queries)
    read = opened.gather(3, slot[:, None, None, :].expand(*opened.shape[:3], -1))
    read = read & (document[:, query, None] == document[:, None, :])[:, None]
    read = read & (position[None, :] <= position[query, None] - window)
    scores = scores.masked_fill(~read.repeat_interleave(group, dim=1), float("-inf"))

    # The state acts as one more key, with its log-sum-exp as score and its z as value.
    z_before, lse_before = state
    scores = torch.cat((scores, lse_before.to(work).transpose(1, 2)[..., None]), dim=-1)
    weights = torch.softmax(scores, dim=-1)
    z = torch.einsum("bhtu,buhe->bthe", weights[..., :num_tokens], v)
    z = z + weights[..., num_tokens].transpose(1, 2)[..., None] * z_before.to(work)
    return z.to(values.dtype), torch.logsumexp(scores, dim=-1).transpose(1, 2)
