"""Llama with tensorized attention, for plain `transformers`.

This file travels inside exported folders. Where the `tensor_attention` package is installed its
kernels are used, elsewhere the PyTorch files beside this one. Weight names are Llama's, plus
`self_attn.hop_bias`. Shape letters: B batch, Q new tokens, T all tokens, H query heads, K key/value
heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention

from .configuration_tensorlm import TensorLMConfig

try:
    from tensor_attention import Rotary, fold_axes, hop
    from tensor_attention.cached import hop_cached
except ImportError:
    from .blocked import hop  # type: ignore[import-not-found, no-redef]
    from .cached import hop_cached  # type: ignore[import-not-found, no-redef]
    from .fold import Rotary, fold_axes  # type: ignore[import-not-found, no-redef]


class FoldLayer(CacheLayerMixin):
    """What one layer remembers: keys of all tokens, recent values, and the state of each hop.

    `keys` [B, T, K, D] are not rotated, since each axis rotates them differently; `values`
    [B, last n_1, K, D]; `states[i]` [B, T, H, D] is z after hop i + 1, the values of hop i + 2.
    """

    is_sliding = False
    is_croppable = False

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, fold: list[int]) -> None:
        super().__init__()
        self.num_values = fold[0] if fold else None
        self.states: list[Tensor | None] = [None] * len(fold)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: the tensors start as the first ones that arrive."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values; returns all keys, and the values that queries can reach."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
            keys, values = key_states, value_states
        else:
            keys = torch.cat((self.keys, key_states), dim=1)
            values = torch.cat((self.values, value_states), dim=1)
        self.keys = keys
        self.values = values if self.num_values is None else values[:, -self.num_values :]
        return keys, values

    def update_state(self, index: int, z: Tensor) -> Tensor:
        """Append the new tokens' z after hop `index` + 1; returns that of all tokens."""
        old = self.states[index]
        self.states[index] = z = z if old is None else torch.cat((old, z), dim=1)
        return z

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return 0 if self.keys is None else self.keys.shape[1]

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, offset) for masks, which this model does not build."""
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.states = [None] * len(self.states)
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        self._map_batch(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def _map_batch(self, change: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.states = [None if z is None else change(z) for z in self.states]


class FoldCache(Cache):
    """One FoldLayer per decoder layer."""

    def __init__(self, config: TensorLMConfig) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(layers=[FoldLayer(config.layer_fold(i)) for i in layers])


class TensorLMAttention(LlamaAttention):
    """Llama's projections around a loop of hops over the folded axes."""

    def __init__(self, config: TensorLMConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.fold = config.layer_fold(layer_idx)
        if self.fold:
            self.hop_bias = nn.Parameter(torch.zeros(len(self.fold), config.num_attention_heads))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary,
        attention_mask: Tensor,
        past_key_values: FoldCache | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """`attention_mask` is doc_start [B, T]; `position_embeddings` the table of T positions."""
        q = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        memory = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        num_new = q.shape[1]
        if memory is not None:
            k, v = memory.update(k, v)
        z, state = v, None
        for i, axis in enumerate(fold_axes(self.fold, k.shape[1])):
            positions = torch.arange(k.shape[1], device=q.device)
            reach = ((positions - attention_mask) // axis.stride)[:, -num_new:]
            run = hop if num_new == k.shape[1] else hop_cached
            z, lse = run(
                q, k, z, stride=axis.stride, length=axis.length, reach=reach.to(torch.int32),
                bias=self.hop_bias[i - 1] if i else None, state=state, rotary=position_embeddings,
                scale=self.scaling,
            )  # fmt: skip
            state = (z, lse)
            if memory is not None and i < len(self.fold):
                z = memory.update_state(i, z)
        return self.o_proj(z.flatten(-2)), None


class TensorLMModel(LlamaModel):
    """The decoder; attention masks become document starts, so nothing of size T x T exists."""

    config_class = TensorLMConfig

    def __init__(self, config: TensorLMConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = TensorLMAttention(config, index)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FoldCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """As LlamaModel; `attention_mask` [B, T] may mask padding on the left only."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = FoldCache(self.config)
        num_seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        num_tokens = num_seen + x.shape[1]
        doc_start = _document_start(attention_mask, x.shape[0], num_tokens, x.device)
        rotary = self._rotary(num_tokens)
        for layer in self.layers:
            x = layer(
                x,
                attention_mask=doc_start,
                position_embeddings=rotary,
                past_key_values=past_key_values,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values if use_cache else None
        )

    def _rotary(self, num_positions: int) -> Rotary:
        inv_freq = self.rotary_emb.inv_freq.float()
        angles = torch.arange(num_positions, device=inv_freq.device).float()[:, None] * inv_freq
        return Rotary(angles.cos(), angles.sin())


def _document_start(
    attention_mask: Tensor | None, batch: int, num_tokens: int, device: torch.device
) -> Tensor:
    """[B, T]: where each token's document begins; padding tokens are documents of their own."""
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.zeros(batch, num_tokens, dtype=torch.int64, device=device)
    positions = torch.arange(num_tokens, device=device)
    first = num_tokens - attention_mask.to(device).long().sum(1, keepdim=True)
    return torch.where(positions < first, positions, first)


class TensorLMForCausalLM(LlamaForCausalLM):
    """The language model; `generate` uses a cache made for folds."""

    config_class = TensorLMConfig

    def __init__(self, config: TensorLMConfig) -> None:
        super().__init__(config)
        self.model = TensorLMModel(config)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = FoldCache(self.config)
