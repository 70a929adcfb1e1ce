"""One new token of a routed layer: window, choice and open blocks in few operations.

The time of a step on a GPU is the time to launch its operations. Values that depend only on
documents and positions are therefore computed once per step for all layers (`Step`). The results
are those of `hop_cached`, `choose_cached` and `routed_hop_cached`. Shape letters: B batch, T all
tokens, N far slots (`routing.py`), W tokens of the window, H query heads, K key heads, G = H / K, D
head size, C blocks of a choice, L open blocks, U entries of open blocks. This file imports only
`fold`, `routing` and `routed_cached` from the project, because exported Hugging Face folders
contain it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .fold import MASKED, Rotary, full_precision
from .routed_cached import gather_entries
from .routing import summed_queries


class Step(NamedTuple):
    """Values shared by all routed layers in one step. The new token is the last of T."""

    cos: Tensor  # [2, B, 1, 1, D]: at its position and at its stretched position, each half twice
    sin: Tensor  # the same, with -sin in the first half
    sequence: Tensor  # [B, 1, 1, 1] int64: the index of each sequence
    document: Tensor  # [B, 1, 1, 1] int64: the first token of its document
    block_zero: Tensor  # [B, 1, 1, block] int64: the tokens of the document's first block
    last: int  # the last token before the window
    hidden: Tensor  # [B, 1, 1, W] bool: tokens of the window that are not in the document
    blocks: Tensor  # [B, 1, N] int32: index in the document of each slot's block, -1 if closed
    closed: Tensor  # [B, 1, N] bool: slots that cannot be chosen
    first_block: Tensor  # [B, 1, 1] int32: 0 if the document's first block is far, else -1
    own: Tensor  # [B, R, 1, 1] bool: which of the last R tokens are in other tiles


def make_step(
    row: Tensor, starts: Tensor, rotary: Rotary, *, window: int, block: int, stretch: int,
    open_tile: int,
) -> Step:  # fmt: skip
    """The step of the last token of a row.

    Args:
        row: [B, T], document starts of all tokens.
        starts: [B, at least N] from `routing.block_starts`.
        rotary: table of at least T positions.
        window, block, stretch, open_tile: settings of the routed layers.
    """
    token, device = row.shape[1] - 1, row.device
    document = row[:, -1:].long()  # [B, 1]
    depth = token - document
    position = torch.stack((torch.full_like(depth, token), depth // stretch))  # [2, B, 1]
    num_far = max(0, (token - window) // block + 1)
    starts = starts[:, :num_far]
    blocks = (starts - document) // block
    closed = (starts > token - window) | (blocks <= 0)
    window = min(window, token + 1)
    hidden = torch.arange(token + 1 - window, token + 1, device=device) < document
    back = torch.arange(min(open_tile, token + 1) - 1, -1, -1, device=device)
    cos, sin = rotary.cos[position], rotary.sin[position]  # [2, B, 1, D/2]
    return Step(
        cos=torch.cat((cos, cos), dim=-1)[..., None, :],
        sin=torch.cat((-sin, sin), dim=-1)[..., None, :],
        sequence=torch.arange(row.shape[0], device=device)[:, None, None, None],
        document=document[:, None, None],
        block_zero=(document + torch.arange(block, device=device))[:, None, None],
        last=token - window,
        hidden=hidden[:, None, None],
        blocks=blocks.masked_fill(closed, -1).to(torch.int32)[:, None],
        closed=closed[:, None],
        first_block=torch.where(depth >= window, 0, -1).to(torch.int32)[:, None],
        own=(back > depth % open_tile)[:, :, None, None],
    )


def rotate_step(q: Tensor, k: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """[2, B, 1, H, D] and [2, B, 1, K, D]: q and k rotated to both positions, rounded once."""
    x = torch.cat((q, k), dim=2)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    other_half = x.roll(x.shape[-1] // 2, dims=-1)
    turned = (x * step.cos + other_half * step.sin).to(q.dtype)
    return turned[:, :, :, : q.shape[2]], turned[:, :, :, q.shape[2] :]


def choose_step(q: Tensor, pooled: Tensor, step: Step, top_k: int) -> Tensor:
    """The token's choice [B, 1, K, top_k + 1] int32: block 0 first, -1 for none.

    Args:
        q: [B, 1, H, D], not rotated.
        pooled: [B, N, P, K, D], from `routing.pooled_keys`.
        step: the token's step.
        top_k: as in `routed.choose_blocks`.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    num_slots, num_parts, num_heads = pooled.shape[1:4]
    queries = summed_queries(q, num_heads).to(work)  # [B, 1, K, D]
    with full_precision(q.device):
        scores = queries.transpose(1, 2) @ pooled.to(work).flatten(1, 2).permute(0, 2, 3, 1)
    scores = scores[:, :, 0].unflatten(2, (num_slots, num_parts)).amax(-1)
    scores = scores.masked_fill(step.closed, float("-inf"))  # [B, K, N]
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    blocks = step.blocks.expand_as(scores).gather(-1, best)
    blocks = torch.cat((step.first_block.expand(-1, num_heads, -1), blocks), dim=-1)
    missing = top_k + 1 - blocks.shape[-1]
    blocks = torch.nn.functional.pad(blocks, (0, missing), value=-1) if missing else blocks
    return blocks[:, None]


def attend_step(
    queries: Tensor,
    keys: tuple[Tensor, Tensor],
    values: Tensor,
    choices: Tensor,
    step: Step,
    *,
    block: int,
    scale: float,
) -> Tensor:
    """[B, 1, H, E]: one softmax over the window and the open blocks.

    Args:
        queries: [2, B, 1, H, D], rotated to the position and to the stretched position.
        keys: [B, at least W, K, D] of the last tokens, rotated to positions, and [B, T, K, D] of
            all tokens, rotated to stretched positions.
        values: [B, T, K, E].
        choices: [B, R, K, C] of the last R tokens.
        step: the token's step.
        block: tokens per block.
        scale: factor on the scores.
    """
    num_keys, size = keys[1].shape[2], step.hidden.shape[-1]
    work = torch.promote_types(values.dtype, torch.float32)
    entries, hidden = _open_entries(choices, step, block)
    places = (step.sequence, entries, torch.arange(num_keys, device=entries.device)[:, None])
    near_k, far_k = keys[0][:, -size:].transpose(1, 2), gather_entries(keys[1], *places)[:, 0]
    near_v, far_v = values[:, -size:].transpose(1, 2), gather_entries(values, *places)[:, 0]
    near_q, far_q = (queries[:, :, 0].to(work) * scale).unflatten(2, (num_keys, -1))
    hidden = torch.cat((step.hidden.expand(-1, num_keys, -1, -1), hidden[:, 0, :, None]), dim=-1)
    with full_precision(values.device):
        scores = torch.cat((near_q @ near_k.to(work).mT, far_q @ far_k.to(work).mT), dim=-1)
        weights = torch.softmax(scores.masked_fill(hidden, MASKED), dim=-1)
        z = weights[..., :size] @ near_v.to(work) + weights[..., size:] @ far_v.to(work)
    return z.flatten(1, 2)[:, None].to(values.dtype)


def _open_entries(choices: Tensor, step: Step, block: int) -> tuple[Tensor, Tensor]:
    """Entries [B, 1, K, U] of the open blocks, each block once, and which of them are hidden."""
    opened = choices[:, -step.own.shape[1] :].masked_fill(step.own, -1)
    opened = opened.transpose(1, 2).flatten(2).sort(dim=-1, descending=True).values  # [B, K, L]
    again = opened[..., 1:] == opened[..., :-1]
    opened[..., 1:].masked_fill_(again, -1)
    if not (opened.is_cuda or torch.compiler.is_compiling()):  # would make the host wait for a GPU
        opened = opened.sort(dim=-1, descending=True).values
        opened = opened[..., : int((opened >= 0).sum(-1).max())]
    entries = (opened * block)[..., None] + step.block_zero  # [B, K, L, block]
    hidden = (entries < step.document) | (entries > step.last)  # block -1 is before the document
    return entries.clamp(min=0).flatten(2)[:, None], hidden.flatten(2)[:, None]
