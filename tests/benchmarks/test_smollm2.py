"""The model of `make adapt`: read from GGUF, written as an unquantized folder."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tensorlm.benchmarks.smollm2 import dequantized
from tensorlm.hf.llama_config import model_settings
from tests.support.hf_models import tiny_llama


def test_a_dequantized_model_can_be_imported(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True).to(torch.bfloat16)
    model.config.quantization_config = {"quant_method": "gguf", "gguf_file": "model.gguf"}
    plain = dequantized(model)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert model_settings(tmp_path)["hidden_size"] == 32  # as import reads it
    assert model.config.quantization_config is not None  # unchanged
    weights = model.state_dict()
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, weights[name])
