"""Tiny random models and checkpoints for the Hugging Face tests."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tensorlm.checkpoint import Checkpoint, open_checkpoint
from tensorlm.checkpoint.publish import write_weights
from tensorlm.config import Config, load_config
from tensorlm.model import Llama
from tests.support.launching import ROOT


def launcher_here(name: str, *arguments: str | Path) -> int:
    """Run a launcher as a script in this process, without the seconds of its imports; its code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "launcher" / name), run_name="__main__")
    return int(left.value.code or 0)


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """Hugging Face's model with random weights, in the shape of the tiny configuration."""
    fields = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,  # large, so that generated tokens differ from one another
    }
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(fields | rope | changes))).eval()


def random_checkpoint(config: Path, *overrides: str) -> tuple[Checkpoint, Config, Llama]:
    """Checkpoint 0 of a run with random weights and hop biases, its settings, and the model."""
    settings = load_config(config, ["model.init_std=0.2", *overrides])
    model = Llama(settings.model)
    model.init_weights(seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("hop_bias"):
            parameter.data.normal_(generator=generator)
    info = {
        "state": {"step": 0, "rows": 0, "tokens": 0},
        "adam_step": 0,
        "adam_state": False,
        "config": settings.model_dump(mode="json", exclude_none=True),
    }
    parameters = ((name, p.detach()) for name, p in model.named_parameters())
    folder = write_weights(Path(settings.run.dir), parameters, info)
    return open_checkpoint(folder), settings, model


def folder_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files by name."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def assert_same_bytes(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal names, types, shapes and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(
            found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
        ), name


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())
