"""Llama with tensorized attention, for plain `transformers`.

This file travels inside exported folders. Where the `tensor_attention` package is installed its
kernels are used, elsewhere the PyTorch files beside this one. Weight names are Llama's, plus
`self_attn.hop_bias`. Shape letters: B batch, Q new tokens, T all tokens, H query heads, K key/value
heads, D head size.
"""

import inspect
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention

from .cache_tensorlm import FoldCache, FoldLayer, new_document_starts
from .configuration_tensorlm import AUTO_MAP, TensorLMConfig

try:
    from tensor_attention import (
        Axis,
        Rotary,
        apply_rotary,
        fold_axes,
        hop,
        rotary_frequencies,
        rotary_table,
        tensor_attention,
    )
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
        rotary_frequencies,
        rotary_table,
    )

MODEL_FILES = ("configuration_tensorlm.py", "cache_tensorlm.py", "modeling_tensorlm.py")
OPERATOR_FILES = ("fold.py", "blocked.py", "cached.py")

# Unread rows in front of each new query from which on gathering what the query visits is faster
# than the kernel. Measured on a CPU; for GPUs an estimate, from 65,536 queries that took about a
# second to gather where a hop of 131,072 rows takes the kernel 2 ms.
_GATHER_FROM, _GATHER_FROM_ON_GPU = 4, 256

# Queries whose mask exists at one time, in full-attention layers of padded batches.
_QUERY_CHUNK = 1024


def write_code(folder: str | Path) -> None:
    """Copy into `folder` all the code that it needs to be loaded without this project."""
    operator = Path(inspect.getfile(hop_cached)).parent
    sources = [Path(__file__).parent / name for name in MODEL_FILES]
    for source in [*sources, *(operator / name for name in OPERATOR_FILES)]:
        shutil.copyfile(source, Path(folder) / source.name)


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
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend from Q new tokens to themselves and what the cache holds.

        Args:
            hidden_states: [B, Q, hidden size].
            position_embeddings: rotary table of at least T positions.
            attention_mask: document starts [B, Q] (`new_document_starts`), None where all are 0.
            past_key_values: the cache, which takes the new tokens in.
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
        visible = torch.arange(k.shape[2], device=q.device)
        parts = []
        for at in range(0, q.shape[2], _QUERY_CHUNK):
            rows = slice(at, at + _QUERY_CHUNK)
            mask = (visible <= positions[rows, None]) & (visible >= starts[:, rows, None])
            parts.append(
                F.scaled_dot_product_attention(
                    q[:, :, rows], k, v, attn_mask=mask[:, None], scale=self.scaling,
                    enable_gqa=True,
                )
            )  # fmt: skip
        return torch.cat(parts, dim=2).transpose(1, 2)


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


class TensorLMModel(LlamaModel):
    """The decoder; attention masks become document starts, so nothing of size T x T exists."""

    config_class = TensorLMConfig

    _table: Rotary | None = None

    def __init__(self, config: TensorLMConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = TensorLMAttention(config, index)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TensorLMAttention) and module.fold:
            nn.init.constant_(module.hop_bias, self.config.hop_bias_init)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FoldCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """As LlamaModel's, except that a cache is made only where `use_cache` asks for it.

        Args:
            attention_mask: [B, T], 0 where padding, on the left or on the right.
            position_ids: [B, Q]; where they start over, a new document begins (packed rows).

        Raises:
            ValueError: padding inside a sequence, a 4-D mask, attention weights asked for (which
                never exist), or a cache that is not a FoldCache.
        """
        if output_attentions:
            raise ValueError("output_attentions: attention weights never exist as a matrix")
        if past_key_values is None and use_cache:
            past_key_values = FoldCache(self.config)
        if not isinstance(past_key_values, FoldCache | None):
            raise ValueError(f"past_key_values: {type(past_key_values).__name__}, not a FoldCache")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        num_seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        doc_start = new_document_starts(
            attention_mask, position_ids, x.shape[0], num_seen, x.shape[1], x.device
        )
        rotary = self._rotary(num_seen + x.shape[1], x.device)
        hidden_states = [x]
        for layer in self.layers:
            x = layer(
                x,
                attention_mask=doc_start,
                position_embeddings=rotary,
                past_key_values=past_key_values,
            )
            if output_hidden_states:
                hidden_states.append(x)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
        )

    def _rotary(self, num_positions: int, device: torch.device) -> Rotary:
        """The table of at least that many positions: made once, angles in float64, then extended.

        Its frequencies are computed anew, since `model.to(torch.bfloat16)` rounds those of
        `rotary_emb`: at position 131,072 that would be tens of radians.
        """
        table = self._table
        if table is None or table.cos.shape[0] < num_positions or table.cos.device != device:
            rope = self.config.rope_parameters
            frequencies = rotary_frequencies(self.config.head_dim, rope["rope_theta"], rope, device)
            size = num_positions + num_positions // 4
            table = self._table = rotary_table(frequencies, size, device)
        return table


class TensorLMForCausalLM(LlamaForCausalLM):
    """The language model; `generate` uses a cache made for folds."""

    config_class = TensorLMConfig

    def __init__(self, config: TensorLMConfig) -> None:
        super().__init__(config)
        self.model = TensorLMModel(config)
        self.post_init()

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As Hugging Face's, with the code that makes the folder complete."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        write_code(save_directory)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = FoldCache(self.config)
