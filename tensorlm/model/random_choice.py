"""A choice of blocks that ignores content: the reference that a choice by content must exceed.

A model adapts to any mask. Only a model that was trained with random blocks of the same number and
size shows how much of the result is due to the choice itself.
"""

import torch
from torch import Tensor

_QUERIES = 2048  # maximum number of queries whose scores exist at a time
_BLOCK_BITS = 24  # a key of the sort holds the score, then the block in these low bits
_WORD = (1 << 32) - 1
# Odd factors for query, key head, layer and block, then those of MurmurHash3's last steps.
_FACTORS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
_MIX = (0x85EBCA6B, 0xC2B2AE35)


@torch.no_grad()
def random_blocks(
    depth: Tensor, num_key_heads: int, *, window: int, block: int, top_k: int, layer: int
) -> Tensor:
    """Blocks as from `tensor_attention.choose_blocks`, with a hash of integers as scores.

    The hash depends only on the token's place in its document, the key head, the layer and the
    block. Ranks that share a row, recomputation, a resumed run and all backends therefore choose
    the same blocks.

    Args:
        depth: [B, Q] integer, number of earlier tokens in each token's document.
        num_key_heads: number of key heads K, which choose independently.
        window, block, top_k: settings of the layer.
        layer: index of the layer.

    Returns:
        [B, Q, K, top_k + 1] int32: block 0 of the document if it is far, `top_k` of the other far
        blocks, and -1 if fewer are far; in any order.
    """
    heads = torch.arange(num_key_heads, device=depth.device)
    parts = [_choose(part, heads, window, block, top_k, layer) for part in depth.split(_QUERIES, 1)]
    return torch.cat(parts, dim=1)


def _choose(
    depth: Tensor, heads: Tensor, window: int, block: int, top_k: int, layer: int
) -> Tensor:
    beyond = depth.long()[:, :, None, None] - window  # a block is far if it begins here or before
    blocks = torch.arange(max(1, int(beyond.max()) // block + 1), device=depth.device)
    token, head, index = depth.long()[:, :, None, None], heads[:, None], blocks
    score = _hash(
        token * _FACTORS[0] + head * _FACTORS[1] + layer * _FACTORS[2] + index * _FACTORS[3]
    )
    keys = score << _BLOCK_BITS | index
    keys = torch.where((index > 0) & (index * block <= beyond), keys, -1)  # [B, Q, K, N]
    best = keys.topk(min(top_k, len(blocks)), dim=-1).values
    chosen = torch.where(best < 0, -1, best & ((1 << _BLOCK_BITS) - 1))
    first = torch.where(beyond >= 0, 0, -1).expand(-1, -1, len(heads), -1)
    chosen = torch.cat((first, chosen), dim=-1).to(torch.int32)
    return torch.nn.functional.pad(chosen, (0, top_k + 1 - chosen.shape[-1]), value=-1)


def _hash(x: Tensor) -> Tensor:
    """Mix int64 values to 32 bits, by the last steps of MurmurHash3."""
    x = x & _WORD
    for factor in _MIX:
        x = (x ^ x >> 15) * factor & _WORD
    return x ^ x >> 16
