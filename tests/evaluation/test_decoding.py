"""The model under evaluation generates what full forward passes would, from the same weights."""

from pathlib import Path

import pytest
import torch

from fold_parallel import Grid
from tensorlm.config import load_config
from tensorlm.evaluation.model import open_random_model
from tests.support.launching import TINY


@torch.no_grad()
@pytest.mark.parametrize(
    "override",
    ["model.fold=[16]", "model.fold=[4,8]", "model.fold=[]", "model.tie_embeddings=true"],
)
def test_answers_are_those_of_full_forward_passes(
    tmp_path: Path, data: Path, override: str
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(TINY.format(run=tmp_path / "run", data=data))
    settings = [override, "model.init_std=0.5", "eval.prefill_chunk=23"]
    config = load_config(path, settings)
    model = open_random_model(config, torch.device("cpu"), Grid())
    prompt = model.encode("import os\n\n\ndef main(argv):\n" * 5)
    tokens, expected = torch.tensor([prompt]), []
    for _ in range(12):
        token = int(model.network(tokens)[0, -1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        expected.append(token)
        tokens = torch.cat((tokens, torch.tensor([[token]])), dim=1)
    assert len(set(expected)) > 3
    text = model.tokenizer.decode(expected)
    assert model.generate(prompt, 12) == text
    part = model.tokenizer.decode(expected[:3])
    found = model.generate(prompt, 12, is_done=lambda text: part in text)
    assert part in found
    assert text.startswith(found)
    assert len(found) < len(text)
    weight = model.generator.model.layers[0].self_attn.q_proj.weight
    assert weight.data_ptr() == model.network.layers[0].self_attn.q_proj.weight.data_ptr()
