"""The attention layer: the projections, and the operator of the layer's kind between them.

Shape letters: B batch, T tokens of this rank, H query heads, K key/value heads, D head size.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fold_parallel import (
    Grid,
    sharded_routed_attention,
    sharded_tensor_attention,
    sharded_window_attention,
)
from fold_parallel.window import depth_in_document
from tensor_attention import Backend, Rotary
from tensor_attention.routed import Keep
from tensorlm.config import LinearFormat, ModelConfig

from .float8 import apply_linears
from .random_choice import random_blocks


class KeptChoice:
    """The blocks that a layer chose in its forward pass, for its recomputation in backward.

    Takes T K (top_k + 1) int32 per layer, a few percent of the checkpointed hidden state.
    """

    def __init__(self) -> None:
        self.choice: Tensor | None = None

    def __call__(self, choose: Callable[[], Tensor]) -> Tensor:
        """Return the kept choice; the first call computes it with `choose`."""
        if self.choice is None:
            self.choice = choose()
        return self.choice


class Attention(nn.Module):
    """Grouped-query attention to a window, a folded sequence, chosen blocks or the whole past."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        grid: Grid,
        backend: Backend,
        linear: LinearFormat = "bf16",
    ) -> None:
        super().__init__()
        self.linear = linear
        self.grid = grid
        self.backend = backend
        self.layer = layer
        self.kind = config.layer_kind(layer)
        self.fold = config.layer_fold(layer)
        self.window = config.window_size
        self.route = config.route
        self.head_dim = config.head_size
        q_size, kv_size = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        bias = torch.zeros(len(self.fold), config.num_heads)
        self.hop_bias = nn.Parameter(bias) if self.fold else None  # only a strided layer has hops

    def forward(
        self, x: Tensor, doc_start: Tensor, rotary: Rotary, kept: KeptChoice | None = None
    ) -> Tensor:
        projections = apply_linears(x, (self.q_proj, self.k_proj, self.v_proj), self.linear)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in projections)
        del projections
        out = self.attend(q, k, v, doc_start, rotary, kept).flatten(-2)
        del q, k, v
        return apply_linears(out, (self.o_proj,), self.linear)[0]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        doc_start: Tensor,
        rotary: Rotary,
        kept: KeptChoice | None = None,
    ) -> Tensor:
        """Apply this layer's operator to q [B, T, H, D], k and v [B, T, K, D]: [B, T, H, D]."""
        match self.kind:
            case "window":
                return sharded_window_attention(
                    q, k, v, window=self.window, grid=self.grid, doc_start=doc_start,
                    rotary=rotary, backend=self.backend,
                )  # fmt: skip
            case "routed":
                assert self.route is not None
                return sharded_routed_attention(
                    q, k, v, window=self.window, block=self.route.block, top_k=self.route.top_k,
                    pool=self.route.pool, stretch=self.route.stretch,
                    open_tile=self.route.open_tile, grid=self.grid,
                    doc_start=doc_start, rotary=rotary, backend=self.backend,
                    keep=self._keep(k, doc_start, kept),
                )  # fmt: skip
            case "strided" | "full":
                return sharded_tensor_attention(
                    q, k, v, self.fold, grid=self.grid, doc_start=doc_start,
                    hop_bias=self.hop_bias, rotary=rotary, backend=self.backend,
                )  # fmt: skip

    def _keep(self, k: Tensor, doc_start: Tensor, kept: KeptChoice | None) -> Keep | None:
        """What `routed_attention` takes as `keep`; it replaces a choice by content if necessary."""
        assert self.route is not None
        if self.route.choice == "content":
            return kept
        depth = depth_in_document(doc_start, self.grid).expand(k.shape[0], -1)
        choose = partial(
            random_blocks, depth, k.shape[2], window=self.window, block=self.route.block,
            top_k=self.route.top_k, layer=self.layer,
        )  # fmt: skip
        return lambda by_content: choose() if kept is None else kept(choose)
