"""Greedy generation with a cache, for a model under evaluation.

Only tasks that generate import this module: transformers' model classes take seconds to import.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

from tensorlm.hf.cache_tensorlm import FoldCache
from tensorlm.hf.configuration_tensorlm import TensorLMConfig
from tensorlm.hf.export_folder import hf_config, hf_name
from tensorlm.hf.llama_config import needs_code
from tensorlm.hf.modeling_tensorlm import TensorLMForCausalLM
from tensorlm.model import Llama


def decoder_of(network: nn.Module, seq_len: int, device: torch.device) -> nn.Module:
    """A model that generates with a cache, and shares the network's weights."""
    logging.set_verbosity_error()  # suppress a warning that the prompt exceeds the trained length
    return _hugging_face_view(network, seq_len, device) if isinstance(network, Llama) else network


def _hugging_face_view(model: Llama, seq_len: int, device: torch.device) -> nn.Module:
    """A Hugging Face model that shares the parameters of `model`."""
    settings = hf_config(model.config, seq_len, "fp32")
    dtype = model.embed_tokens.weight.dtype
    with torch.device("meta"):
        if needs_code(model.config):
            view = TensorLMForCausalLM(TensorLMConfig(**settings))
        else:
            view = LlamaForCausalLM(LlamaConfig(**settings))
    weights = {hf_name(name): p for name, p in model.named_parameters()}
    view.load_state_dict(weights, strict=not model.config.tie_embeddings, assign=True)
    view.tie_weights()
    with device:
        view.model.rotary_emb = LlamaRotaryEmbedding(view.config)
    view.config.dtype = dtype
    return view.eval()


def make_cache(decoder: Any, prompt_length: int, num_tokens: int) -> FoldCache | None:
    """A cache for a prompt and its answer that keeps the choices of the answer's tokens.

    Returns:
        The cache; None for a plain Llama, which makes its own.
    """
    if not isinstance(decoder, TensorLMForCausalLM):
        return None
    return FoldCache(decoder.config, expected=prompt_length + num_tokens, choices=num_tokens)


def continue_greedily(
    decoder: Any,
    tokens: Tensor,
    num_tokens: int,
    eos_id: int,
    prefill_chunk: int,
    cache: FoldCache | None,
    is_done: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """The most likely continuation of a prompt.

    Args:
        decoder: from `decoder_of`.
        tokens: [1, L] int64, the prompt.
        num_tokens: maximum length of the continuation.
        eos_id: id that ends the continuation.
        prefill_chunk: tokens of the prompt per forward pass.
        cache: empty, from `make_cache`.
        is_done: called with the continuation after each token; True ends it.

    Returns:
        [M] int64, M <= num_tokens, without the prompt.
    """
    length = tokens.shape[1]
    whole: Tensor = decoder.generate(
        tokens,
        past_key_values=cache,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=num_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=eos_id,
        eos_token_id=eos_id,
        prefill_chunk_size=prefill_chunk if length > prefill_chunk else None,
        stopping_criteria=StoppingCriteriaList([_Done(length, is_done)] if is_done else []),
    )
    return whole[0, length:]


class _Done(StoppingCriteria):
    """Ends a continuation of one prompt as soon as a function of it is true."""

    def __init__(self, prompt_length: int, is_done: Callable[[Tensor], bool]) -> None:
        self._prompt_length, self._is_done = prompt_length, is_done

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """[1] bool, for `input_ids` [1, L], prompt included."""
        is_done = self._is_done(input_ids[0, self._prompt_length :])
        return torch.full((1,), is_done, device=input_ids.device)
