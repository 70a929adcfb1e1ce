"""The attention layer: projections, then tensorized or full attention.

Shape letters: B batch, T tokens of this rank, H query heads, K key/value heads, D head size.
"""

import torch
from torch import Tensor, nn

from fold_parallel import Grid, sharded_tensor_attention
from tensor_attention import Backend, Rotary
from tensorlm.config import ModelConfig


class Attention(nn.Module):
    """Grouped-query attention over the folded sequence; `fold = ()` makes it full attention."""

    def __init__(self, config: ModelConfig, layer: int, grid: Grid, backend: Backend) -> None:
        super().__init__()
        self.grid = grid
        self.backend = backend
        self.fold = config.layer_fold(layer)
        self.head_dim = config.head_size
        q_size, kv_size = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        bias = torch.zeros(len(self.fold), config.num_heads)
        self.hop_bias = nn.Parameter(bias) if self.fold else None  # full attention has one hop

    def forward(self, x: Tensor, doc_start: Tensor, rotary: Rotary) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        out = sharded_tensor_attention(
            q, k, v, self.fold, grid=self.grid, doc_start=doc_start, hop_bias=self.hop_bias,
            rotary=rotary, backend=self.backend,
        )  # fmt: skip
        return self.o_proj(out.flatten(-2))
