"""The attention layer: projections, then tensorized or full attention.

Shape letters: B batch, T tokens of this rank, H query heads, K key/value heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fold_parallel import Grid, sharded_full_attention, sharded_tensor_attention
from tensor_attention import Rotary, apply_rotary

from .config import ModelConfig


class Attention(nn.Module):
    """Grouped-query attention over the folded sequence; `fold = ()` makes it full attention."""

    def __init__(self, config: ModelConfig, layer: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.fold = config.layer_fold(layer)
        self.head_dim = config.head_size
        q_size, kv_size = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        if self.fold:
            self.hop_bias = nn.Parameter(torch.zeros(len(self.fold), config.num_heads))

    def forward(self, x: Tensor, doc_start: Tensor, rotary: Rotary) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.fold:
            out = sharded_tensor_attention(
                q, k, v, self.fold, grid=self.grid, doc_start=doc_start, hop_bias=self.hop_bias,
                rotary=rotary,
            )  # fmt: skip
        else:

            def attend(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor) -> Tensor:
                return full_attention(q, k, v, doc_start, rotary)

            out = sharded_full_attention(q, k, v, attend, grid=self.grid, doc_start=doc_start)
        return self.o_proj(out.flatten(-2))


def full_attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding and causal softmax attention inside each document.

    Args:
        q: [B, T, H, D], T tokens of the whole row.
        k, v: [B, T, K, D].
        doc_start: [B, T] first token of each token's document.
        rotary: table of at least T positions.

    Returns:
        [B, T, H, D].
    """
    position = torch.arange(q.shape[1], device=q.device)
    q, k = apply_rotary(q, rotary, position), apply_rotary(k, rotary, position)
    causal = position[None, :, None] >= position[None, None, :]
    allowed = causal & (position[None, None, :] >= doc_start[:, :, None])
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=allowed[:, None], enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2)
