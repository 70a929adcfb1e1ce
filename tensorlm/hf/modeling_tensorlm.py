"""Llama with window, strided, routed and full attention layers, for plain `transformers`.

This file and those that it imports are part of exported folders. Weight names are Llama's, plus
`self_attn.hop_bias`. Shape letters: B batch, Q new tokens, T all tokens, D head size.
"""

import inspect
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import can_return_tuple

from .attention_tensorlm import TensorLMAttention
from .cache_tensorlm import FoldCache
from .configuration_tensorlm import AUTO_MAP, TensorLMConfig, check_operator, rope_fields
from .documents_tensorlm import Documents, Signals, document_starts
from .hop_tensorlm import depth_of  # noqa: F401
from .routed_tensorlm import routed_documents

# transformers 4 copies only the files of a folder that this file imports, so it imports all.
try:
    from tensor_attention import Rotary, hop, rotary_frequencies, rotary_table
    from tensor_attention.cached import hop_cached
except ImportError:
    from .blocked import hop  # type: ignore[import-not-found, no-redef] # noqa: F401
    from .cached import hop_cached  # type: ignore[import-not-found, no-redef]
    from .fold import (  # type: ignore[import-not-found, no-redef]
        Rotary,
        rotary_frequencies,
        rotary_table,
    )
    from .routed_blocked import choose_blocks  # type: ignore[import-not-found] # noqa: F401
    from .routed_cached import choose_cached  # type: ignore[import-not-found] # noqa: F401
    from .routed_decode import make_step  # type: ignore[import-not-found] # noqa: F401
    from .routing import block_starts  # type: ignore[import-not-found] # noqa: F401

MODEL_FILES = (
    "configuration_tensorlm.py", "documents_tensorlm.py", "cache_tensorlm.py",
    "hop_tensorlm.py", "routed_tensorlm.py", "attention_tensorlm.py", "modeling_tensorlm.py",
)  # fmt: skip
OPERATOR_FILES = (
    "fold.py", "blocked.py", "cached.py", "routing.py", "routed_blocked.py", "routed_cached.py",
    "routed_decode.py",
)  # fmt: skip

# Keyword arguments of a forward pass that only the loss uses.
_OF_THE_LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")


def write_code(folder: str | Path) -> None:
    """Copy all code into `folder` that is needed to load it without this project."""
    operator = Path(inspect.getfile(hop_cached)).parent
    sources = [Path(__file__).parent / name for name in MODEL_FILES]
    for source in [*sources, *(operator / name for name in OPERATOR_FILES)]:
        shutil.copyfile(source, Path(folder) / source.name)


class TensorLMModel(LlamaModel):
    """The decoder; it turns attention masks into document starts, so no T x T mask exists."""

    config_class = TensorLMConfig
    _can_record_outputs: ClassVar[dict[str, type]] = {"hidden_states": LlamaDecoderLayer}

    _table: Rotary | None = None

    def __init__(self, config: TensorLMConfig) -> None:
        check_operator(config)
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = TensorLMAttention(config, index)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TensorLMAttention) and module.fold:
            nn.init.constant_(module.hop_bias, self.config.hop_bias_init)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FoldCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        cache_position: Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Like LlamaModel's, except that training creates a cache only if `use_cache` is True.

        Args:
            attention_mask: [B, T], 0 for padding on the left or right; other numbers are those of
                packed documents.
            position_ids: [B or 1, Q]; a new document begins where one is not the previous plus 1.
            use_cache: None: use the configuration's value, but no cache in training and in
                `torch.export`.
            seq_idx, cu_seq_lens_q, cu_seq_lens_k: packed documents (`documents_tensorlm.Signals`).
            max_length_q, max_length_k, cache_position: ignored, since the other arguments and the
                cache determine them.
            others: arguments that only the loss uses, and arguments that are None.

        Raises:
            ValueError: there is padding inside a sequence, `position_ids` are not those of packed
                documents, the mask is 4-D, attention weights are requested (they never exist), the
                cache is not a FoldCache, or an argument is not supported.
        """
        self._refuse(others, output_attentions, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        num_seen = 0 if cache is None else cache.get_seq_length()
        doc_start, last_document = document_starts(
            Signals(attention_mask, position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k),
            x.shape[0], x.shape[1], num_seen, None if cache is None else cache.last_document,
            x.device,
        )  # fmt: skip
        rotary = self._rotary(num_seen + x.shape[1], x.device)
        documents = Documents(doc_start)
        if self.config.route:
            route = self.config.route_numbers
            documents = routed_documents(doc_start, x, num_seen, route, rotary)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        count = self.config.num_hidden_layers
        wanted = _wanted_states(output_hidden_states, count + 1)
        hidden_states = []  # others are freed after their layer
        for index, layer in enumerate(self.layers[:count]):
            hidden_states.append(x if index in wanted else None)
            x = layer(
                x, attention_mask=documents, position_embeddings=rotary, past_key_values=cache
            )
        x = self.norm(x)
        hidden_states.append(x if count in wanted else None)
        if cache is not None:
            cache.last_document = last_document
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=None if output_hidden_states is False else tuple(hidden_states),
        )

    def _refuse(
        self, others: dict[str, Any], output_attentions: bool | None, cache: FoldCache | None
    ) -> None:
        """Raise ValueError for arguments that would have no effect."""
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions must be false: attention weights never exist as a matrix"
            )
        if not isinstance(cache, FoldCache | None):
            raise ValueError(f"past_key_values must be a FoldCache, got {type(cache).__name__}")
        if others.get("is_causal") is True:
            others = others | {"is_causal": None}
        unknown = [k for k, v in others.items() if v is not None and k not in _OF_THE_LOSS]
        if unknown:
            raise ValueError(f"{unknown[0]}: this model does not support the argument")

    def _cache(self, cache: FoldCache | None, use_cache: bool | None) -> FoldCache | None:
        """The caller's cache, a new one, or None."""
        if self.gradient_checkpointing and self.training:  # layers run twice, and would add twice
            if cache is not None and cache.get_seq_length():
                raise ValueError("past_key_values must be empty while gradients are checkpointed")
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
            use_cache = use_cache and not torch.compiler.is_exporting()
        return FoldCache(self.config) if cache is None and use_cache else cache

    def _rotary(self, num_positions: int, device: torch.device) -> Rotary:
        """A rotary table of at least `num_positions`: created once, then only extended."""
        if torch.compiler.is_compiling():
            return _make_table(self.config, num_positions, device)
        table = self._table
        if table is None or table.cos.shape[0] < num_positions or table.cos.device != device:
            with torch.inference_mode(False):  # inference tensors cannot be used in training
                size = num_positions + num_positions // 4
                table = self._table = _make_table(self.config, size, device)
        return table


def _make_table(config: TensorLMConfig, num_positions: int, device: torch.device) -> Rotary:
    """Compute a rotary table, without `rotary_emb`, which `model.to(torch.bfloat16)` rounds.

    At position 131,072 the error would be tens of radians.
    """
    rope = rope_fields(config)
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    frequencies = rotary_frequencies(head_dim, rope["rope_theta"], rope, device)
    return rotary_table(frequencies, num_positions, device)


def _wanted_states(chosen: bool | int | list[int], count: int) -> set[int]:
    """Indices of the hidden states to return out of `count`: all, none, or the chosen ones."""
    if isinstance(chosen, bool):
        return set(range(count)) if chosen else set()
    indices = [chosen] if isinstance(chosen, int) else chosen
    return {index % count for index in indices if -count <= index < count}


class TensorLMForCausalLM(LlamaForCausalLM):
    """The language model; `generate` uses a FoldCache."""

    config_class = TensorLMConfig
    _can_record_outputs = TensorLMModel._can_record_outputs

    def __init__(self, config: TensorLMConfig) -> None:
        # Skip LlamaForCausalLM's constructor. It would build a second model, which would remove
        # `gradient_checkpointing` from the configuration and take as much memory again.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = TensorLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Like Hugging Face's, and also write the model's code."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        write_code(save_directory)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *others: Any, **named: Any
    ) -> None:
        chosen = generation_config.cache_implementation
        if chosen not in (None, "dynamic"):
            raise ValueError(
                f'cache_implementation must be unset or "dynamic", got "{chosen}" (this model '
                "needs its own cache)"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = FoldCache(self.config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *others, **named)
