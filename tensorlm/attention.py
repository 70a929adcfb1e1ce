"""The attention layer: projections, then tensorized or full attention.

Shape letters: B batch, T tokens, H query heads, K key/value heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensor_attention import Rotary, apply_rotary, tensor_attention

from .config import ModelConfig


class Attention(nn.Module):
    """Grouped-query attention over the folded sequence; `fold = ()` makes it full attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
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
            out = tensor_attention(
                q, k, v, self.fold, doc_start=doc_start, hop_bias=self.hop_bias, rotary=rotary
            )
        else:
            positions = torch.arange(x.shape[1], device=x.device)
            q, k = apply_rotary(q, rotary, positions), apply_rotary(k, rotary, positions)
            out = full_attention(q, k, v, doc_start)
        return self.o_proj(out.flatten(-2))


def full_attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor) -> Tensor:
    """Causal softmax attention inside each document; q, k are rotated already.

    Args:
        q: [B, T, H, D].
        k, v: [B, T, K, D].
        doc_start: [B, T] first token of each token's document.

    Returns:
        [B, T, H, D].
    """
    position = torch.arange(q.shape[1], device=q.device)
    causal = position[None, :, None] >= position[None, None, :]
    allowed = causal & (position[None, None, :] >= doc_start[:, :, None])
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=allowed[:, None], enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2)
