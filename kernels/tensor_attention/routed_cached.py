"""The routed axis for the newest tokens of a sequence with cached keys and means: decoding.

The choice reads one stored mean per past block, and the hop reads only open blocks: per token
T / block means and (top_k + 1) * block entries, or all that its tile has opened. Queries and keys
are already rotated. Shape letters: B batch, Q new tokens, T all tokens, N slots (`routing.py`), H
query heads, K key heads, G = H / K, D head size, E value size, C blocks of a choice, U entries that
a query reads. This file imports only `fold` and `routing` from the project, because exported
Hugging Face folders contain it.
"""

import torch
from torch import Tensor

from .fold import FLOOR, MASKED, State, full_precision
from .routing import best_blocks, block_scores, summed_queries

_QUERY_CHUNK = 8  # queries whose entries are gathered at a time
_CHOICE_CHUNK = 512  # queries whose scores for all slots are held at a time
_NOTHING = torch.iinfo(torch.int32).max


def choose_cached(
    q: Tensor,
    pooled: Tensor,
    starts: Tensor,
    doc_start: Tensor,
    *,
    window: int,
    block: int,
    top_k: int,
) -> Tensor:
    """The results of `routed.choose_blocks` for the last Q of T tokens.

    Args:
        q: [B, Q, H, D], not rotated.
        pooled: [B, N, P, K, D], from `routing.pooled_keys`, of the first N slots, which include all
            that are far from any query.
        starts: [B, N], first tokens of their blocks, from `routing.block_starts`.
        doc_start: [B, T].
        window, block, top_k: as in `routed.choose_blocks`.

    Returns:
        [B, Q, K, top_k + 1] int32.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    first = doc_start.shape[1] - q.shape[1]
    q = summed_queries(q, pooled.shape[3]).to(work).transpose(1, 2)  # [B, K, Q, D]
    pooled = pooled.to(work)
    parts = []
    for at in range(0, q.shape[2], _CHOICE_CHUNK):
        with full_precision(q.device):
            scores = block_scores(q[:, :, at : at + _CHOICE_CHUNK], pooled)
        parts.append(best_blocks(scores, starts, doc_start, first + at, window, block, top_k))
    return torch.cat(parts, dim=1)


def routed_hop_cached(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    choice: Tensor,
    *,
    window: int,
    block: int,
    open_tile: int,
    doc_start: Tensor,
    state: State,
    scale: float,
) -> State:
    """The results of `routed.routed_hop` for the last Q of T tokens.

    Args:
        q: [B, Q, H, D], rotated.
        k: [B, T, K, D], rotated.
        values: [B, T, K, E].
        choice: [B, P + Q, K, C] of the queries and the P tokens before them: at least the
            open_tile - 1 tokens that can share a tile with the first query, or all there are.
        doc_start: [B, Q], of the queries.
        state: (z [B, Q, H, E], lse [B, Q, H]) of the window.
        window, block, open_tile, scale: as in `routed.routed_hop`.

    Returns:
        (z [B, Q, H, E] in the dtype of `values`, lse [B, Q, H] in float32 or wider).
    """
    num_new, before = q.shape[1], choice.shape[1] - q.shape[1]
    num_far = max(0, (k.shape[1] - 1 - window) // block + 1)
    parts = []
    for at in range(0, num_new, _QUERY_CHUNK):
        rows = slice(at, min(at + _QUERY_CHUNK, num_new))
        token = torch.arange(rows.start, rows.stop, device=q.device) + k.shape[1] - num_new
        document = doc_start[:, rows].long()
        depth = token - document
        chosen = choice[:, max(0, before + rows.start - open_tile + 1) : before + rows.stop]
        opened = _open_blocks(chosen, depth, open_tile, num_far)
        first = document[:, :, None, None] + opened * block
        entries = first[..., None] + torch.arange(block, device=q.device)  # [B, Q, K, L, block]
        seen = (opened >= 0)[..., None] & (entries <= (token - window)[:, None, None, None])
        parts.append(
            _attend(
                q[:, rows], k, values, entries.clamp(0, k.shape[1] - 1).flatten(3),
                seen.flatten(3), (state[0][:, rows], state[1][:, rows]), scale,
            )
        )  # fmt: skip
    return torch.cat([z for z, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def _open_blocks(choice: Tensor, depth: Tensor, open_tile: int, num_far: int) -> Tensor:
    """[B, Q, K, L] int64: the blocks open to each query, without duplicates, -1 for none.

    Args:
        choice: [B, S, K, C] of tokens up to and including the queries.
        depth: [B, Q], index in the document of each query.
        open_tile: as in `routed.routed_hop`.
        num_far: upper bound on the number of far blocks of any query.
    """
    num_new = depth.shape[1]
    back = torch.arange(min(open_tile, choice.shape[1]), device=choice.device)
    source = torch.arange(choice.shape[1] - num_new, choice.shape[1], device=choice.device)
    source = source[:, None] - back  # [Q, R]
    shares = (back <= (depth % open_tile)[..., None]) & (source >= 0)  # [B, Q, R]
    opened = choice[:, source.clamp(min=0)].transpose(2, 3)  # [B, Q, K, R, C]
    opened = torch.where(shares[:, :, None, :, None] & (opened >= 0), opened, _NOTHING).flatten(3)
    if open_tile > 1:  # a token chooses a block once, but its tile may choose it more often
        opened = opened.sort(dim=-1).values
        again = torch.zeros_like(opened, dtype=torch.bool)
        again[..., 1:] = opened[..., 1:] == opened[..., :-1]
        opened = opened.masked_fill(again, _NOTHING)
    opened = opened.sort(dim=-1).values[..., :num_far]
    if not (opened.is_cuda or torch.compiler.is_compiling()):  # would make the host wait for a GPU
        opened = opened[..., : int((opened != _NOTHING).sum(-1).max())]
    return torch.where(opened == _NOTHING, -1, opened).long()


def _attend(
    q: Tensor, k: Tensor, values: Tensor, entries: Tensor, seen: Tensor, state: State, scale: float
) -> State:
    """One softmax over the state and those of the entries [B, Q, K, U] that `seen` marks."""
    work = torch.promote_types(q.dtype, torch.float32)
    sequence = torch.arange(k.shape[0], device=k.device)[:, None, None, None]
    places = (sequence, entries, torch.arange(k.shape[2], device=k.device)[:, None])
    keys, read = gather_entries(k, *places).to(work), gather_entries(values, *places).to(work)
    q_groups = q.to(work).unflatten(2, (k.shape[2], -1))
    with full_precision(q.device):
        scores = torch.einsum("bqkgd,bqkud->bqkgu", q_groups, keys) * scale
    scores = scores.masked_fill(~seen[:, :, :, None], MASKED).flatten(2, 3)
    before = state[1].to(work)[..., None].clamp(min=MASKED)
    scores = torch.cat((scores, before), dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    sees_nothing = lse < FLOOR
    weights = torch.softmax(scores, dim=-1).masked_fill(sees_nothing[..., None], 0)
    grouped = weights[..., :-1].unflatten(2, (k.shape[2], -1))
    with full_precision(q.device):
        z = torch.einsum("bqkgu,bqkue->bqkge", grouped, read).flatten(2, 3)
    z = z + weights[..., -1:] * state[0].to(work)
    return z.to(values.dtype), lse.masked_fill(sees_nothing, float("-inf"))


def gather_entries(x: Tensor, sequence: Tensor, entries: Tensor, head: Tensor) -> Tensor:
    """[B, Q, K, U, D]: the entries [B, Q, K, U] of x [B, T, K, D].

    `sequence` [B, 1, 1, 1] and `head` [K, 1] are the indices of these. Gradients of an entry that
    is read more than once are added in float32.
    """
    if not x.requires_grad:
        return x[sequence, entries, head]
    return x.to(torch.promote_types(x.dtype, torch.float32))[sequence, entries, head].to(x.dtype)
