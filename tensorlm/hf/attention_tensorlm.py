"""Llama's attention layer of any kind: window, strided, routed or full.

This file is part of exported folders. It uses the kernels of the `tensor_attention` package if that
is installed, else the PyTorch files next to it. Shape letters: B batch, Q new tokens, T all tokens,
H query heads, K key/value heads, D head size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaAttention

from .cache_tensorlm import FoldCache, FoldLayer
from .configuration_tensorlm import TensorLMConfig
from .documents_tensorlm import Documents
from .hop_tensorlm import depth_of, hop_new
from .routed_tensorlm import attend_routed

try:
    from tensor_attention import Axis, Rotary, apply_rotary, fold_axes, tensor_attention
except ImportError:
    tensor_attention = None  # type: ignore[assignment]
    from .fold import (  # type: ignore[import-not-found, no-redef]
        Axis,
        Rotary,
        apply_rotary,
        fold_axes,
    )

# Number of queries per mask in full-attention layers with padded or packed batches.
_QUERY_CHUNK = 1024


class _Inputs(NamedTuple):
    """q [B, Q, H, D]; k, v [B, Q, K, D], not rotated; [B, Q] document starts; the layer's cache."""

    q: Tensor
    k: Tensor
    v: Tensor
    doc_start: Tensor | None
    rotary: Rotary
    memory: FoldLayer | None


class TensorLMAttention(LlamaAttention):
    """Llama's projections with the attention of this layer's kind."""

    def __init__(self, config: TensorLMConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.kind, self.fold = config.layer_kind(layer_idx), config.layer_fold(layer_idx)
        if self.fold:
            self.hop_bias = nn.Parameter(torch.empty(len(self.fold), config.num_attention_heads))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary,
        attention_mask: Documents,
        past_key_values: FoldCache | None = None,
        position_ids: None = None,
        use_cache: bool = False,
        cache_position: None = None,
    ) -> tuple[Tensor, None]:
        """Attend from Q new tokens to themselves and to the cached tokens.

        Args:
            hidden_states: [B, Q, hidden size].
            position_embeddings: rotary table of at least T positions.
            attention_mask: the beginnings of documents.
            past_key_values: the cache, to which the new tokens are added.
            position_ids, use_cache, cache_position: passed by the decoder layer, always with their
                default values.
        """
        q = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        memory = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        if self.kind == "routed":
            out = attend_routed(
                q, k, v, attention_mask, position_embeddings, self.config.route_numbers,
                self.scaling, memory,
            )  # fmt: skip
        else:
            attend = {"window": self._window, "strided": self._strided, "full": self._full}
            inputs = _Inputs(q, k, v, attention_mask.starts, position_embeddings, memory)
            out = attend[self.kind](inputs)
        return self.o_proj(out.flatten(-2)), None

    def _window(self, inputs: _Inputs) -> Tensor:
        q, k, v, doc_start, rotary, memory = inputs
        num_seen = 0 if memory is None else memory.get_seq_length()
        depth = depth_of(doc_start, q, num_seen)
        table: Rotary | None = rotary
        if memory is not None:  # cached keys are rotated once
            positions = torch.arange(num_seen, num_seen + q.shape[1], device=q.device)
            q, k = apply_rotary(q, rotary, positions), apply_rotary(k, rotary, positions)
            (k, v), table = memory.update(k, v), None
        axis = Axis(1, self.config.window_size)
        return hop_new(q, k, v, axis, depth, rotary=table, scale=self.scaling)[0]

    def _strided(self, inputs: _Inputs) -> Tensor:
        q, k, v, doc_start, rotary, memory = inputs
        if memory is None and tensor_attention is not None:
            return tensor_attention(
                q, k, v, self.fold, doc_start=doc_start, hop_bias=self.hop_bias, rotary=rotary,
                scale=self.scaling,
            )  # fmt: skip
        if memory is not None:
            k, v = memory.update(k, v)
        depth = depth_of(doc_start, q, k.shape[1] - q.shape[1])
        z, state = v, None
        for i, axis in enumerate(fold_axes(self.fold, k.shape[1])):
            z, lse = hop_new(
                q, k, z, axis, (depth // axis.stride).to(torch.int32), rotary=rotary,
                bias=self.hop_bias[i - 1] if i else None, state=state, scale=self.scaling,
            )  # fmt: skip
            state = (z, lse)
            if memory is not None and i < len(self.fold):
                z = memory.update_state(i, z)
        return z

    def _full(self, inputs: _Inputs) -> Tensor:
        q, k, v, doc_start, rotary, memory = inputs
        num_seen = 0 if memory is None else memory.get_seq_length()
        positions = torch.arange(num_seen, num_seen + q.shape[1], device=q.device)
        q, k = apply_rotary(q, rotary, positions), apply_rotary(k, rotary, positions)
        if memory is not None:
            k, v = memory.update(k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if doc_start is None and q.shape[2] in (1, k.shape[2]):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=q.shape[2] > 1, scale=self.scaling, enable_gqa=True
            )
            return out.transpose(1, 2)
        starts = torch.zeros_like(positions)[None] if doc_start is None else doc_start
        parts = []
        for at in range(0, q.shape[2], _QUERY_CHUNK):
            rows = slice(at, at + _QUERY_CHUNK)
            stop = num_seen + min(at + _QUERY_CHUNK, q.shape[2])
            parts.append(
                checkpoint(  # otherwise backward would keep the masks of all chunks
                    _attend_rows, q[:, :, rows], k[:, :, :stop], v[:, :, :stop], positions[rows],
                    starts[:, rows], self.scaling, use_reentrant=False,
                )
            )  # fmt: skip
        return torch.cat(parts, dim=2).transpose(1, 2)


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, starts: Tensor, scale: float
) -> Tensor:
    """Full attention of queries [B, H, Q, D] at `positions` [Q], within their documents."""
    visible = torch.arange(k.shape[2], device=q.device)
    mask = (visible <= positions[:, None]) & (visible >= starts[..., None])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, None], scale=scale, enable_gqa=True
    )
