"""Replacing the attention of a stock Llama in place, for your own Hugging Face scripts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from tensor_attention import validate_fold

from .attention_tensorlm import TensorLMAttention
from .configuration_tensorlm import TensorLMConfig, check_layers, check_operator
from .modeling_tensorlm import TensorLMForCausalLM, TensorLMModel

# As in configs/llama8b_32k.toml: the kind of attention that keeps most of full attention's quality.
_WINDOW = 1024
_ROUTE = {"block": 64, "top_k": 16, "stretch": 16}


def attach(
    model: LlamaForCausalLM,
    fold: Sequence[int] | None = None,
    *,
    full_every: int = 0,
    hop_bias_init: float = -4.0,
    window: int = 0,
    route: Mapping[str, int] | None = None,
    route_every: int = 0,
    layers: Sequence[str] = (),
) -> TensorLMForCausalLM:
    """Turn a stock `LlamaForCausalLM` into one with window, strided or routed layers, in place.

    Weights stay the same tensors with the same names; each strided layer gains
    `self_attn.hop_bias`. Within the window (`window` or `fold[0]` tokens) logits do not change.
    `save_pretrained` writes a folder that loads like an exported one. Attach before `peft` wraps
    the model and before an optimizer collects its parameters.

    Args:
        model: a model from `LlamaForCausalLM.from_pretrained` (or AutoModelForCausalLM), on any
            device.
        fold: lengths of the inner axes, innermost first.
        full_every: every k-th layer keeps full attention (0: none).
        hop_bias_init: initial value of the learned bias of outer hops; -4 begins as a local window.
        window: tokens that window and routed layers always read (0: `fold[0]`).
        route: settings of routed layers, such as `dict(block=64, top_k=16, stretch=16)`, and
            optionally `open_tile` and `pool` (default: 16 each); None: no routed layers. If fold,
            window, route and layers are all omitted, all layers are routed: a window of 1,024
            tokens, 16 blocks of 64, stretch 16 (docs/method.md).
        route_every: every k-th layer is routed, and the others are window layers (strided if a fold
            is given); 0: all layers are routed.
        layers: instead, the kind of each layer: "window", "strided", "routed" or "full".

    Returns:
        The same object.

    Raises:
        ValueError: the model is not a plain LlamaForCausalLM, arguments are invalid or contradict
            each other, or its rotary embedding or attention dropout is not supported.
    """
    if type(model) is not LlamaForCausalLM:
        raise ValueError(
            f"attach: model must be a plain LlamaForCausalLM, got {type(model).__name__} (attach "
            "before other wrappers)"
        )
    config = model.config
    if fold is None:
        fold = ()
        if not (window or route or layers):
            window, route = _WINDOW, _ROUTE
    if not isinstance(fold, Sequence) or not all(isinstance(n, int) for n in fold):
        raise ValueError(f"attach: fold must be a list of integers, got {fold!r}")
    if not isinstance(full_every, int) or full_every < 0:
        raise ValueError(f"attach: full_every must be an integer of at least 0, got {full_every!r}")
    validate_fold(fold)
    if not (fold or window or route or layers):
        raise ValueError(
            "attach: fold, window, route or layers must be given, got none (the model already has "
            "full attention)"
        )
    fields = {
        "fold": list(fold), "full_every": full_every, "hop_bias_init": hop_bias_init,
        "window": window, "route": None if route is None else dict(route),
        "route_every": route_every, "layers": list(layers),
    }  # fmt: skip
    try:
        check_operator(config)
        check_layers(_with(TensorLMConfig(num_hidden_layers=config.num_hidden_layers), fields))
    except ValueError as error:
        raise ValueError(f"attach: {error}") from None
    attentions = [layer.self_attn for layer in model.model.layers]
    if any("forward" in vars(module) for module in (model, model.model, *attentions)):
        raise ValueError(
            "attach: forward must not be replaced, but a device_map over several devices or a "
            "patch has replaced it (load the model without it)"
        )

    config.__class__ = TensorLMConfig
    _with(config, fields)
    model.__class__ = TensorLMForCausalLM
    model.model.__class__ = TensorLMModel
    for layer, attention in enumerate(attentions):
        _replace(attention, config, layer, model.dtype)
    return model


def _with(config: TensorLMConfig, fields: Mapping[str, Any]) -> TensorLMConfig:
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def _replace(
    attention: LlamaAttention, config: TensorLMConfig, layer: int, dtype: torch.dtype
) -> None:
    attention.__class__ = TensorLMAttention
    attention.kind, attention.fold = config.layer_kind(layer), config.layer_fold(layer)
    if attention.fold:
        shape = (len(attention.fold), config.num_attention_heads)
        device = attention.o_proj.weight.device
        bias = torch.full(shape, config.hop_bias_init, dtype=dtype, device=device)
        attention.hop_bias = nn.Parameter(bias)
