"""Tensorize a stock Llama in place, to try it in one's own Hugging Face script."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from tensor_attention import validate_fold

from .attention_tensorlm import TensorLMAttention
from .configuration_tensorlm import TensorLMConfig, check_operator
from .modeling_tensorlm import TensorLMForCausalLM, TensorLMModel


def attach(
    model: LlamaForCausalLM,
    fold: Sequence[int],
    *,
    full_every: int = 0,
    hop_bias_init: float = -4.0,
) -> TensorLMForCausalLM:
    """Turn a stock `LlamaForCausalLM` into a tensorized one, in place.

    Weights stay the same tensors under the same names; each folded layer gains
    `self_attn.hop_bias`. Inside the first axis (`fold[0]` tokens) its logits stay the same.
    `save_pretrained` writes a folder that loads like an exported one. Attach before `peft` wraps
    the model and before an optimizer collects its parameters.

    Args:
        model: from `LlamaForCausalLM.from_pretrained` (or AutoModelForCausalLM), on any device.
        fold: lengths of the inner axes, innermost first.
        full_every: every k-th layer stays full attention; 0: none.
        hop_bias_init: the learned bias of outer hops starts here; -4 begins as a local window.

    Returns:
        The same object.

    Raises:
        ValueError: not a plain LlamaForCausalLM, an empty or impossible fold or `full_every`, a
            rotary embedding or attention dropout that the operator does not have.
    """
    if type(model) is not LlamaForCausalLM:
        raise ValueError(
            f"attach: {type(model).__name__}, not a plain LlamaForCausalLM (attach before other "
            "wrappers)"
        )
    config = model.config
    if not isinstance(fold, Sequence) or not all(isinstance(n, int) for n in fold):
        raise ValueError(f"attach: fold is {fold!r}, not a list of whole numbers")
    if not isinstance(full_every, int) or full_every < 0:
        raise ValueError(f"attach: full_every is {full_every!r}, not a whole number from 0 on")
    validate_fold(fold)
    if not fold:
        raise ValueError("attach: fold is empty: that is full attention, the model as it is")
    try:
        check_operator(config)
    except ValueError as error:
        raise ValueError(f"attach: {error}") from None
    attentions = [layer.self_attn for layer in model.model.layers]
    if any("forward" in vars(module) for module in (model, model.model, *attentions)):
        raise ValueError(
            "attach: a forward is replaced already (device_map over several devices, or a patch): "
            "load the model without it"
        )

    config.__class__ = TensorLMConfig
    config.fold, config.full_every = list(fold), full_every
    config.hop_bias_init = hop_bias_init
    model.__class__ = TensorLMForCausalLM
    model.model.__class__ = TensorLMModel
    for layer, attention in enumerate(attentions):
        _tensorize(attention, config.layer_fold(layer), hop_bias_init, model.dtype)
    return model


def _tensorize(
    attention: LlamaAttention, fold: list[int], hop_bias_init: float, dtype: torch.dtype
) -> None:
    attention.__class__ = TensorLMAttention
    attention.fold = fold
    if fold:
        shape = (len(fold), attention.config.num_attention_heads)
        device = attention.o_proj.weight.device
        bias = torch.full(shape, hop_bias_init, dtype=dtype, device=device)
        attention.hop_bias = nn.Parameter(bias)
