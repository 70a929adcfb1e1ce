"""Folders load where this project is absent: plain `transformers`, and the code in the folder."""

import json
import re
from pathlib import Path

import torch

from tensorlm.checkpoint import load_weights, select_checkpoint
from tensorlm.config import load_config
from tensorlm.data.tokenizer.tokenizers import load_tokenizer
from tensorlm.hf import attach
from tensorlm.hf.export_folder import export_checkpoint
from tensorlm.model import Llama
from tests.hf.test_hf_routed import ROUTED
from tests.support.hf_models import folder_weights, random_checkpoint, relative_error, tiny_llama
from tests.support.launching import TrainRanks
from tests.support.without_us import run_without_us

LOAD = """
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
folder, tokens, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert "tensor_attention" not in sys.modules
tokens = torch.load(tokens)
"""
LOGITS_AND_TOKENS = """
mask = torch.ones_like(tokens)
mask[1, :9] = 0
settings = dict(attention_mask=mask, max_new_tokens=20, pad_token_id=0, eos_token_id=None)
result = {
    "logits": model(tokens[:1]).logits.detach(),
    "cached": model.generate(tokens, do_sample=False, **settings),
    "uncached": model.generate(tokens, do_sample=False, use_cache=False, **settings),
}
torch.save(result, out)
model.save_pretrained(folder + "-again")  # complete: code, names, values
again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True).eval()
assert torch.equal(again(tokens).logits, model(tokens).logits)
"""
LONG = """
with torch.no_grad():
    logits = model(tokens).logits
    start = model(tokens[:, :-1], use_cache=True, logits_to_keep=1)
    last = model(tokens[:, -1:], past_key_values=start.past_key_values, use_cache=True)
torch.save({"logits": logits, "cached": last.logits}, out)
"""


def test_exported_run_gives_our_logits_and_cached_tokens_without_this_project(
    tmp_path: Path, config: Path, train_ranks: TrainRanks, data: Path
) -> None:
    overrides = ("model.fold=[4,8]", "zero.stage=3")
    train_ranks("train.steps=12", *overrides, ranks=2)
    settings = load_config(config, list(overrides))
    checkpoint = select_checkpoint(tmp_path / "run", None)
    assert len(checkpoint.manifest["files"]) == 2
    export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", data / "tokenizer")

    prompt = torch.randint(3, 512, (2, 90))
    torch.save(prompt, tmp_path / "prompt.pt")
    files = (tmp_path / "hf", tmp_path / "prompt.pt", tmp_path / "out.pt")
    run_without_us(LOAD + LOGITS_AND_TOKENS, *files, cwd=tmp_path)
    result = torch.load(tmp_path / "out.pt")

    model = Llama(settings.model)
    load_weights(checkpoint, model)
    with torch.no_grad():
        assert relative_error(result["logits"], model(prompt[:1])) < 1e-5
    assert torch.equal(result["cached"], result["uncached"])


def test_logits_past_position_65536_are_ours(tmp_path: Path, config: Path) -> None:
    overrides = ("model.fold=[32,64]", "model.vocab_size=64", "model.num_layers=1")
    checkpoint, settings, model = random_checkpoint(config, *overrides, "model.full_every=0")
    export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", None)
    tokens = torch.randint(64, (1, 70_000))
    torch.save(tokens, tmp_path / "tokens.pt")
    files = (tmp_path / "hf", tmp_path / "tokens.pt", tmp_path / "out.pt")
    run_without_us(LOAD + LONG, *files, cwd=tmp_path)
    result = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        wanted = model(tokens)
    assert relative_error(result["logits"][:, :65_536], wanted[:, :65_536]) < 1e-5
    assert relative_error(result["logits"][:, 65_536:], wanted[:, 65_536:]) < 1e-5
    assert relative_error(result["cached"], wanted[:, -1:]) < 1e-5


def test_folder_says_what_it_is(tmp_path: Path, config: Path, data: Path) -> None:
    scaling = 'model.rope_scaling={rope_type="llama3", factor=8.0}'
    checkpoint, settings, _ = random_checkpoint(config, "model.fold=[4,8]", scaling)
    folder = tmp_path / "hf"
    export_checkpoint(checkpoint, settings, folder, "bf16", data / "tokenizer")
    fields = json.loads((folder / "config.json").read_text())
    assert fields["torch_dtype"] == "bfloat16"
    assert fields["rope_theta"] == 10000.0
    assert fields["rope_scaling"]["rope_type"] == "llama3"
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (1, 2)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    card = (folder / "README.md").read_text()
    for fact in ("fold [4, 8]", "0 steps, 0 tokens", "learning rate 0.003 (cosine)"):
        assert fact in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    text = "def main():\n    return 1"
    check = f"""
FOLDER = sys.argv[1]
{code}
assert tokenizer.encode({text!r}) == {load_tokenizer(data / "tokenizer").encode(text)}
tokens = tokenizer({text!r}, return_tensors="pt", return_token_type_ids=False)
assert model.generate(**tokens, max_new_tokens=4).shape[1] == tokens["input_ids"].shape[1] + 4
"""
    run_without_us(check, folder, cwd=tmp_path)


@torch.no_grad()
def test_attached_model_saves_a_folder_that_is_complete(tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    attach(model, fold=[4, 8], full_every=2, hop_bias_init=-1.0)
    assert not hasattr(model.model.layers[1].self_attn, "hop_bias")  # stays full attention
    model.save_pretrained(tmp_path / "saved")
    tokens = torch.randint(512, (1, 60))
    torch.save({"tokens": tokens, "logits": model(tokens).logits}, tmp_path / "wanted.pt")
    check = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
wanted = torch.load(sys.argv[2])
assert torch.equal(model(wanted["tokens"]).logits, wanted["logits"])
"""
    run_without_us(check, tmp_path / "saved", tmp_path / "wanted.pt", cwd=tmp_path)


def test_routed_folder_gives_our_logits_and_cached_tokens_without_this_project(
    tmp_path: Path, config: Path
) -> None:
    checkpoint, settings, model = random_checkpoint(config, *ROUTED)
    export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", None)
    assert not any("hop_bias" in name for name in folder_weights(tmp_path / "hf"))
    prompt = torch.randint(3, 512, (2, 2 * settings.data.seq_len))
    torch.save(prompt, tmp_path / "prompt.pt")
    files = (tmp_path / "hf", tmp_path / "prompt.pt", tmp_path / "out.pt")
    run_without_us(LOAD + LOGITS_AND_TOKENS, *files, cwd=tmp_path)
    result = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        assert relative_error(result["logits"], model(prompt[:1])) < 1e-5
    assert torch.equal(result["cached"], result["uncached"])
