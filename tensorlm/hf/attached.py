"""Give a stock Llama other attention in place, to try it in one's own Hugging Face script."""

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


def attach(
    model: LlamaForCausalLM,
    fold: Sequence[int] = (),
    *,
    full_every: int = 0,
    hop_bias_init: float = -4.0,
    window: int = 0,
    route: Mapping[str, int] | None = None,
    route_every: int = 0,
    layers: Sequence[str] = (),
) -> TensorLMForCausalLM:
    """Turn a stock `LlamaForCausalLM` into one with window, strided or routed layers, in place.

    Weights stay the same tensors under the same names; each strided layer gains
    `self_attn.hop_bias`. Inside the window (`window` or `fold[0]` tokens) its logits stay the same.
    `save_pretrained` writes a folder that loads like an exported one. Attach before `peft` wraps
    the model and before an optimizer collects its parameters.

    Args:
        model: from `LlamaForCausalLM.from_pretrained` (or AutoModelForCausalLM), on any device.
        fold: lengths of the inner axes, innermost first.
        full_every: every k-th layer stays full attention; 0: none.
        hop_bias_init: the learned bias of outer hops starts here; -4 begins as a local window.
        window: tokens that window and routed layers always read; 0: `fold[0]`.
        route: numbers of the routed layers, such as `dict(block=64, top_k=16, stretch=16)`, and
            `open_tile` (16 where absent); None: no routed layers.
        route_every: every k-th layer is routed, the others window layers (strided ones where a fold
            is given); 0: all are routed.
        layers: or the kind of each layer by name: "window", "strided", "routed" or "full".

    Returns:
        The same object.

    Raises:
        ValueError: not a plain LlamaForCausalLM, fields that are impossible or contradict each
            other, a rotary embedding or attention dropout that the operator does not have.
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
    if not (fold or window or route or layers):
        raise ValueError("attach: fold is empty: that is full attention, the model as it is")
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
            "attach: a forward is replaced already (device_map over several devices, or a patch): "
            "load the model without it"
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
