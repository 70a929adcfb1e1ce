"""Attach: a stock Llama becomes a tensorized one in place, and trains in Hugging Face's Trainer."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from tensorlm.data.tokenizer.tokenizers import copy_tokenizer
from tensorlm.hf import attach
from tensorlm.hf.configuration_tensorlm import TensorLMConfig
from tensorlm.hf.modeling_tensorlm import TensorLMForCausalLM
from tests.support.hf_models import (
    assert_same_bytes,
    folder_weights,
    relative_error,
    tiny_llama,
)
from tests.support.launching import ROOT


@torch.no_grad()
def test_attached_model_is_the_same_inside_the_first_axis_and_folded_beyond() -> None:
    tokens = torch.randint(512, (2, 100))
    model = tiny_llama()
    before, weights = model(tokens).logits, dict(model.named_parameters())
    assert attach(model, fold=[16]) is model
    after = model(tokens).logits
    assert relative_error(after[:, :16], before[:, :16]) < 1e-5
    assert relative_error(after[:, 16:], before[:, 16:]) > 1e-3
    named = dict(model.named_parameters())
    assert all(named.pop(name) is parameter for name, parameter in weights.items())
    biases = {f"model.layers.{i}.self_attn.hop_bias" for i in range(2)}
    assert named.keys() == biases
    assert all((bias == -4).all() and bias.requires_grad for bias in named.values())
    config = TensorLMConfig(**(tiny_llama().config.to_dict() | {"fold": [16]}))
    same = TensorLMForCausalLM(config).eval()
    same.load_state_dict(model.state_dict())
    assert torch.equal(same(tokens).logits, after)  # attached or built: one model


@pytest.mark.parametrize(
    ("changes", "fold", "message"),
    [
        ({}, [], "fold, window, route or layers must be given"),
        ({}, [1], "at least 2"),
        ({}, [8.0], r"fold must be a list of integers, got \[8.0\]"),
        ({}, 8, "fold must be a list of integers, got 8"),
        ({"attention_dropout": 0.1}, [16], "attention_dropout"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            [16],
            "rope_type must be .* got dynamic",
        ),
    ],
)
def test_what_cannot_be_attached_to_is_refused_and_unchanged(
    changes: dict[str, Any], fold: Any, message: str
) -> None:
    model = tiny_llama(**changes)
    with pytest.raises(ValueError, match=message):
        attach(model, fold=fold)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(name.endswith("hop_bias") for name in model.state_dict())


def test_other_models_are_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="full_every must be an integer of at least 0, got -1"):
        attach(model, fold=[16], full_every=-1)
    attach(model, fold=[16])
    with pytest.raises(ValueError, match="plain LlamaForCausalLM, got TensorLMForCausalLM"):
        attach(model, fold=[16])
    with pytest.raises(ValueError, match="got LlamaForSequenceClassification"):
        attach(LlamaForSequenceClassification(tiny_llama().config), fold=[16])
    patched = tiny_llama()
    patched.model.layers[0].self_attn.forward = lambda *_: None
    with pytest.raises(ValueError, match="forward must not be replaced"):
        attach(patched, fold=[16])


def test_gradient_checkpointing_changes_no_gradient() -> None:
    tokens = torch.randint(512, (2, 50))
    gradients = []
    for checkpointing in (False, True):
        model = tiny_llama().train()
        attach(model, fold=[8])
        if checkpointing:
            model.activation_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_documented_example_trains_with_lora_and_saves_a_loadable_model(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    start = tiny_llama()
    start.save_pretrained(tmp_path / "llama")
    copy_tokenizer(data / "tokenizer", tmp_path / "llama")
    lines = (ROOT / "README.md").read_text().splitlines()
    documents = [" ".join(lines[i : i + 6]) for i in range(0, len(lines), 6)]
    (tmp_path / "text.txt").write_text("\n".join(filter(None, documents)))
    command = [sys.executable, "docs/attach_example.py", "--model", str(tmp_path / "llama")]
    command += ["--text", str(tmp_path / "text.txt"), "--length", "64", "--steps", "3"]
    folded = ["--fold", "8", "--lora", "--output", str(tmp_path / "tuned")]
    subprocess.run([*command, *folded], cwd=ROOT, check=True, timeout=300)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    before, after = folder_weights(tmp_path / "llama"), folder_weights(tmp_path / "tuned")
    biases = {name: after.pop(name) for name in list(after) if name.endswith("hop_bias")}
    assert len(biases) == 2
    assert all((bias != -4).any() for bias in biases.values())
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    adapted = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qv"}
    assert changed == adapted
    loaded = {name: p.detach() for name, p in model.named_parameters()}
    assert_same_bytes(loaded, after | biases)

    routed = ["--window", "16", "--route", "8", "2", "4", "--output", str(tmp_path / "routed")]
    monkeypatch.setattr(sys, "argv", [*command[1:], *routed])
    runpy.run_path(str(ROOT / "docs/attach_example.py"), run_name="__main__")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "routed", trust_remote_code=True)
    assert model.config.route == {"block": 8, "top_k": 2, "stretch": 4}
    assert model.config.layer_kind(0) == "routed"
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
