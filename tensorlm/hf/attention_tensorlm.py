"""Llama's attention layer with hops over the folded axes. This file travels in exported folders.

Where the `tensor_attention` package is installed its kernels are used, elsewhere the PyTorch files
beside this one. Shape letters: B batch, Q new tokens, T all tokens, H query heads, K key/value
heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaAttention

from .cache_tensorlm import FoldCache, FoldLayer
from .configuration_tensorlm import TensorLMConfig

try:
    from tensor_attention import Axis, Rotary, apply_rotary, fold_axes, hop, tensor_attention
    from tensor_attention.cached import hop_cached
except ImportError:
    tensor_attention = None  # type: ignore[assignment]
    from .blocked import hop  # type: ignore[import-not-found, no-redef]
    from .cached import hop_cached  # type: ignore[import-not-found, no-redef]
    from .fold import (  # type: ignore[import-not-found, no-redef]
        Axis,
        Rotary,
        apply_rotary,
        fold_axes,
    )

# Unread rows in front of each new query from which on gathering what the query visits is faster
# than the kernel. Measured on a CPU; for GPUs an estimate, from 65,536 queries that took about a
# second to gather where a hop of 131,072 rows takes the kernel 2 ms.
_GATHER_FROM, _GATHER_FROM_ON_GPU = 4, 256

# Queries whose mask exists at one time, in full-attention layers of padded or packed batches.
_QUERY_CHUNK = 1024


class TensorLMAttention(LlamaAttention):
    """Llama's projections around a loop of hops over the folded axes."""

    def __init__(self, config: TensorLMConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.fold = config.layer_fold(layer_idx)
        if self.fold:
            self.hop_bias = nn.Parameter(torch.empty(len(self.fold), config.num_attention_heads))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary,
        attention_mask: Tensor | None,
        past_key_values: FoldCache | None = None,
        position_ids: None = None,
        use_cache: bool = False,
        cache_position: None = None,
    ) -> tuple[Tensor, None]:
        """Attend from Q new tokens to themselves and what the cache holds.

        Args:
            hidden_states: [B, Q, hidden size].
            position_embeddings: rotary table of at least T positions.
            attention_mask: document starts [B, Q] (`document_starts`), None where all are 0.
            past_key_values: the cache, which takes the new tokens in.
            position_ids, use_cache, cache_position: the decoder layer hands them on, always at
                their defaults.
        """
        q = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        memory = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        attend = self._folded if self.fold else self._full
        out = attend(q, k, v, attention_mask, position_embeddings, memory)
        return self.o_proj(out.flatten(-2)), None

    def _folded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        doc_start: Tensor | None,
        rotary: Rotary,
        memory: FoldLayer | None,
    ) -> Tensor:
        if memory is None and tensor_attention is not None:
            return tensor_attention(
                q, k, v, self.fold, doc_start=doc_start, hop_bias=self.hop_bias, rotary=rotary,
                scale=self.scaling,
            )  # fmt: skip
        num_new = q.shape[1]
        if memory is not None:
            k, v = memory.update(k, v)
        positions = torch.arange(k.shape[1] - num_new, k.shape[1], device=q.device)
        depth = positions if doc_start is None else positions - doc_start
        depth = depth.expand(q.shape[0], -1)
        z, state = v, None
        for i, axis in enumerate(fold_axes(self.fold, k.shape[1])):
            z, lse = _hop_new(
                q, k, z, axis, (depth // axis.stride).to(torch.int32), rotary=rotary,
                bias=self.hop_bias[i - 1] if i else None, state=state, scale=self.scaling,
            )  # fmt: skip
            state = (z, lse)
            if memory is not None and i < len(self.fold):
                z = memory.update_state(i, z)
        return z

    def _full(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        doc_start: Tensor | None,
        rotary: Rotary,
        memory: FoldLayer | None,
    ) -> Tensor:
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
                checkpoint(  # else backward would hold the masks of all chunks
                    _attend_rows, q[:, :, rows], k[:, :, :stop], v[:, :, :stop], positions[rows],
                    starts[:, rows], self.scaling, use_reentrant=False,
                )
            )  # fmt: skip
        return torch.cat(parts, dim=2).transpose(1, 2)


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, starts: Tensor, scale: float
) -> Tensor:
    """Full attention of the queries [B, H, Q, D] at `positions` [Q], inside their documents."""
    visible = torch.arange(k.shape[2], device=q.device)
    mask = (visible <= positions[:, None]) & (visible >= starts[..., None])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, None], scale=scale, enable_gqa=True
    )


def _hop_new(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    axis: Axis,
    reach: Tensor,
    *,
    rotary: Rotary,
    bias: Tensor | None,
    state: tuple[Tensor, Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One hop for the last Q of T tokens; arguments as in `hop_cached`.

    Few queries gather the entries that they visit. Many (the prompt, or a long piece of it) run the
    kernel on the tokens within reach, with rows in front that nobody reads: a hop goes a whole
    number of strides, and only differences of positions matter, so it may start at any token.
    """
    num_tokens, num_new = k.shape[1], q.shape[1]
    first = max(0, num_tokens - num_new - (axis.length - 1) * axis.stride)
    pad = num_tokens - num_new - first
    if pad > num_new * (_GATHER_FROM_ON_GPU if q.is_cuda else _GATHER_FROM):
        return hop_cached(
            q, k, values, stride=axis.stride, length=axis.length, reach=reach, bias=bias,
            state=state, rotary=rotary, scale=scale,
        )  # fmt: skip
    if pad or first:
        q, reach = F.pad(q, (0, 0, 0, 0, pad, 0)), F.pad(reach, (pad, 0))
        k, values = k[:, first:], values[:, -pad - num_new :]
        if state is not None:
            state = (F.pad(state[0], (0, 0, 0, 0, pad, 0)), F.pad(state[1], (0, 0, pad, 0)))
    z, lse = hop(
        q, k, values, stride=axis.stride, length=axis.length, reach=reach, bias=bias, state=state,
        rotary=rotary, scale=scale,
    )  # fmt: skip
    return z[:, pad:], lse[:, pad:]
