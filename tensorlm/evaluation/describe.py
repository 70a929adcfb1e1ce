"""Descriptions of the model, the text and the call, for reports."""

import hashlib
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorlm.config import Config, ModelConfig, attention_in_words, layers_in_words
from tensorlm.model.flops import num_parameters

_SAMPLED = 16  # number of evenly spaced elements to sample from each parameter


@torch.no_grad()
def weights_digest(network: nn.Module) -> str:
    """A sha256 of names, shapes and some elements of all parameters, to tell models apart.

    It is the same on any device. This rank must hold every parameter in full.
    """
    digest = hashlib.sha256()
    sampled = []
    for name, parameter in network.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} ".encode())
        flat, num = parameter.detach().reshape(-1), parameter.numel()
        # Integer arithmetic: float32 would round the last index up beyond 2 ** 24 elements.
        count = min(_SAMPLED, num)
        places = torch.arange(count, device=flat.device) * (num - 1) // max(count - 1, 1)
        sampled.append(flat[places].double())
    digest.update(torch.cat(sampled).cpu().numpy().tobytes())
    return digest.hexdigest()


def describe_model(network: nn.Module, model_config: Any, tokens: int | None) -> dict[str, Any]:
    """The facts `parameters` and `attention`, and `trained_tokens` if known.

    Args:
        network: the model; it may be divided by ZeRO 3.
        model_config: a `[model]` section, or the configuration of a Hugging Face folder.
        tokens: number of tokens that the model was trained on; None: unknown.
    """
    facts = {"parameters": num_parameters(network), "attention": describe_attention(model_config)}
    return facts if tokens is None else {**facts, "trained_tokens": tokens}


def describe_attention(model_config: Any) -> str:
    """`fold [256]`, `full attention`, or a list of the kinds of layers.

    Args:
        model_config: as in `describe_model`; other models' folders do not define kinds.
    """
    if isinstance(model_config, ModelConfig):
        return attention_in_words(model_config)
    if not hasattr(model_config, "layer_kind"):
        return "full attention"
    kinds = [model_config.layer_kind(i) for i in range(model_config.num_hidden_layers)]
    fold, window = model_config.fold or (), model_config.window_size
    return layers_in_words(kinds, fold, window, model_config.route)


def describe_call(config: Config, output: Path) -> dict[str, Any]:
    """The facts `text`, `date`, `commands` and `output` of a finished evaluation."""
    return {
        "text": config.eval.text or f"valid split of {config.data.path}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commands": [shlex.join(["python", *sys.argv])],
        "output": str(output.resolve()),
    }
