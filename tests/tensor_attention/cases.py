"""Inputs and measures that the tests of the operator share.

Shape letters: B batch, T tokens, H query heads, K key heads, D head size, E value size.
"""

from typing import Any

import torch
from torch import Tensor

from tensor_attention import Rotary, tensor_attention
from tensor_attention.api import Backend

BACKENDS: list[Backend] = ["dense", "blocked"]


def doc_start_of(lengths: list[int]) -> Tensor:
    """[1, sum(lengths)] int32: the start of the document of each token."""
    starts = [sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)]
    return torch.tensor([starts], dtype=torch.int32)


def inputs(
    num_tokens: int, heads: int = 2, key_heads: int = 1, dim: int = 4, batch: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random float64 q [B,T,H,D], k [B,T,K,D], v [B,T,K,D]."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, num_tokens, h, dim, generator=generator, dtype=torch.float64)
        for h in (heads, key_heads, key_heads)
    )
    return q, k, v


def rotary_table(positions: int, head_dim: int) -> Rotary:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return Rotary(angles.cos(), angles.sin())


def effective_matrix(q: Tensor, k: Tensor, fold: list[int], **options: Any) -> Tensor:
    """[B, H, T, T]: how much of each token's value reaches each output (values = identity)."""
    batch, num_tokens = q.shape[:2]
    identity = torch.eye(num_tokens, dtype=q.dtype)[None, :, None]
    v = identity.expand(batch, num_tokens, k.shape[2], num_tokens)
    return tensor_attention(q, k, v, fold, **options).transpose(1, 2)


def document_mask(doc_start: Tensor) -> Tensor:
    """[B, T, T] bool: u is in t's document and not after t."""
    positions = torch.arange(doc_start.shape[1])
    return (positions[None, None] >= doc_start[..., None]) & (positions[None] <= positions[:, None])


def relative_error(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).abs().max() / reference.abs().max().clamp_min(1e-300))


def cotangent_like(out: Tensor) -> Tensor:
    """Fixed random quarters between -2 and 2: exact in every dtype, so that no rounding differs."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-8, 9, out.shape, generator=generator).to(out.dtype) / 4


def run_with_gradients(
    tensors: list[Tensor], fold: list[int], **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of q, k, v (and hop_bias) for the cotangent of `cotangent_like`."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    q, k, v, *rest = leaves
    bias = rest[0] if rest else None
    out = tensor_attention(q, k, v, fold, hop_bias=bias, **options)
    return out.detach(), list(torch.autograd.grad(out, leaves, cotangent_like(out)))
