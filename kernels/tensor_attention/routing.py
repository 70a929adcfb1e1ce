"""Geometry of the routed axis: the blocks of a document, and those that a token may choose.

A *block* is `block` consecutive tokens of one document, counted from the document's first token. A
block is *far* from token t if it begins at or before t - window, so that all its tokens are before
t. A document's last, shorter block is never far from any of its tokens (block <= window). Every
block that can be chosen is therefore full, and floor(start / block) identifies it in the row: its
*slot*. A row of T tokens has ceil(T / block) slots, whatever documents it contains.

The mathematics is in `kernels/README.md`. This file imports only `fold` from the project, because
exported Hugging Face folders contain it.
"""

import torch
from torch import Tensor

from .fold import Rotary, apply_rotary

# Supported by the GPU kernels: tokens per block, and maximum tokens per tile of queries.
KERNEL_BLOCKS = (16, 32, 64, 128)
KERNEL_TILE = 16
KERNEL_PARTS = 8
# Tokens whose mean key is one candidate of the choice, unless the caller says otherwise.
POOL = 16


def validate_route(
    window: int, block: int, top_k: int, stretch: int, open_tile: int, pool: int = 1
) -> None:
    """Raise ValueError unless the numbers are valid for a routed axis."""
    if not 1 <= block <= window:
        raise ValueError(f"block must be between 1 and the window of {window} tokens, got {block}")
    numbers = {"top_k": top_k, "stretch": stretch, "open_tile": open_tile, "pool": pool}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def num_parts(block: int, pool: int) -> int:
    """Number of parts of `pool` tokens in a block; the last one may be shorter."""
    return -(-block // pool)


def why_no_kernels(block: int, open_tile: int, pool: int = POOL) -> str | None:
    """Why the GPU kernels do not support these numbers, or None if they do."""
    if block not in KERNEL_BLOCKS:
        return f"block must be one of {KERNEL_BLOCKS}, got {block}"
    if pool < block and (block % pool or num_parts(block, pool) > KERNEL_PARTS):
        return (
            f"pool must divide block = {block} into at most {KERNEL_PARTS} parts, or be at least "
            f"block, got {pool}"
        )
    if open_tile > KERNEL_TILE:
        return f"open_tile must be at most {KERNEL_TILE}, got {open_tile}"
    return None


def check_choice_of_blocks(
    choice: Tensor, k: Tensor, queries: int, first: int, open_tile: int
) -> None:
    """Raise ValueError unless `choice` is [B, P + Q, K, C] int32, C >= 1, on the keys' device.

    P tokens come before the Q queries: at least the open_tile - 1 tokens that can share a tile with
    the first query, or all that the row has.
    """
    shape, least = list(choice.shape), min(first, open_tile - 1)
    rows = [k.shape[0], k.shape[2]]
    if choice.ndim != 4 or [shape[0], shape[2]] != rows or not shape[3]:
        raise ValueError(f"choice must be [{rows[0]}, P + Q, {rows[1]}, C], got {shape}")
    if not queries + least <= shape[1] <= queries + first:
        need = f"{queries} queries" + (f" and {least} to {first} tokens before" if first else "")
        raise ValueError(f"choice must cover {need}, got {shape[1]} tokens")
    if choice.dtype != torch.int32 or choice.device != k.device:
        expected = f"int32 on {k.device}"
        raise ValueError(f"choice must be {expected}, got {choice.dtype} on {choice.device}")


def positions_in_document(doc_start: Tensor) -> Tensor:
    """[B, T] int64: the distance of each token from the first token of its document."""
    return torch.arange(doc_start.shape[1], device=doc_start.device) - doc_start


def rotate_stretched(
    x: Tensor, rotary: Rotary | None, doc_start: Tensor, stretch: int, first: int = 0
) -> Tensor:
    """Rotate tokens to position floor((t - d(t)) / stretch); unchanged if `rotary` is None.

    Args:
        x: [B, Q, H, D], of the tokens first, first + 1, ... of a row.
        rotary: table of at least T positions.
        doc_start: [B, T], of the whole row.
        stretch: divisor of positions.
        first: index in the row of the first token of `x`.
    """
    if rotary is None:
        return x
    position = positions_in_document(doc_start)[:, first : first + x.shape[1]]
    return apply_rotary(x, rotary, position // stretch)


def block_starts(doc_start: Tensor, block: int) -> Tensor:
    """[B, ceil(T / block)] int64: the first token of each slot's block.

    The block of slot j contains token (j + 1) * block - 1. A slot without a full block gets the
    start of a block that is never far.
    """
    num_tokens = doc_start.shape[1]
    last = torch.arange(block - 1, num_tokens + block - 1, block, device=doc_start.device)
    last = last.clamp(max=num_tokens - 1)
    document = doc_start[:, last].long()
    return document + (last - document) // block * block


def pooled_keys(k: Tensor, starts: Tensor, block: int, pool: int, first: int = 0) -> Tensor:
    """[B, N, P, K, D]: mean keys of the P parts of each slot's block, `pool` tokens each.

    The last part is shorter if `pool` does not divide `block`. Means are summed in float32 or wider
    and rounded once. Beyond the end of the row, the last token is repeated: this has no effect,
    because blocks that extend there are never far.

    Args:
        k: [B, T - first, K, D], keys of the row's tokens from `first` on.
        starts: [B, N], first tokens of the blocks in the row, at least `first`.
        block, pool: tokens of a block and of a part.
        first: index in the row of the first key.
    """
    tokens = starts[:, None] - first + torch.arange(block, device=k.device)[:, None]
    tokens = tokens.clamp(max=k.shape[1] - 1)  # [B, block, N]
    rows = torch.arange(k.shape[0], device=k.device)[:, None, None]
    work = torch.promote_types(k.dtype, torch.float32)
    parts = [k[rows, part].to(work).mean(1).to(k.dtype) for part in tokens.split(pool, dim=1)]
    return torch.stack(parts, dim=2)


def summed_queries(q: Tensor, num_key_heads: int) -> Tensor:
    """[B, T, K, D]: the sum of the queries of each key head's group, rounded once."""
    work = torch.promote_types(q.dtype, torch.float32)
    return q.unflatten(2, (num_key_heads, -1)).to(work).sum(3).to(q.dtype)


def block_scores(q: Tensor, pooled: Tensor) -> Tensor:
    """[B, K, Q, N]: the score of each slot's block, that of its best part.

    Args:
        q: [B, K, Q, D], summed over groups.
        pooled: [B, N, P, K, D], of the same dtype.
    """
    first, *others = (q @ part.permute(0, 2, 3, 1) for part in pooled.unbind(2))
    for scores in others:
        first = torch.maximum(first, scores)
    return first


def best_blocks(
    scores: Tensor,
    starts: Tensor,
    doc_start: Tensor,
    first: int,
    window: int,
    block: int,
    top_k: int,
) -> Tensor:
    """The choice of tokens first, first + 1, ... from their scores for all slots.

    Args:
        scores: [B, K, C, N], of C tokens.
        starts: [B, N] from `block_starts`.
        doc_start: [B, T].
        first: index in the row of the first of the C tokens.
        window, block, top_k: as in `routed.choose_blocks`.

    Returns:
        [B, C, K, top_k + 1] int32: indices of blocks in the document, ascending, then -1 if fewer
        are far. Block 0 is chosen if it is far; ties go to the earlier block.
    """
    count = scores.shape[2]
    token = torch.arange(first, first + count, device=scores.device)
    document = doc_start[:, first : first + count].long()
    index = (starts[:, None] - document[:, :, None]) // block  # [B, C, N], in the document
    far = (starts[:, None] <= (token - window)[:, None]) & (starts[:, None] >= document[..., None])
    others = far & (index > 0)
    scores = scores.masked_fill(~others[:, None], float("-inf"))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    kept = others[:, None].expand_as(scores).gather(-1, best)
    chosen = index[:, None].expand_as(scores).gather(-1, best)
    nothing = torch.iinfo(torch.int32).max
    chosen = torch.where(kept, chosen, nothing)
    has_first = (token - window >= document)[:, None, :, None].expand(-1, scores.shape[1], -1, -1)
    chosen = torch.cat((torch.where(has_first, 0, nothing), chosen), dim=-1).sort(dim=-1).values
    chosen = torch.where(chosen == nothing, -1, chosen).to(torch.int32).transpose(1, 2)
    missing = top_k + 1 - chosen.shape[-1]
    return torch.nn.functional.pad(chosen, (0, missing), value=-1) if missing else chosen
