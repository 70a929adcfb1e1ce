"""Hugging Face: exported folders work where this project is absent, and weights come back."""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tensorlm.checkpoint import load_weights, select_checkpoint
from tensorlm.config import load_config
from tensorlm.hf.convert import export_checkpoint, import_weights
from tensorlm.model import Llama
from tests.tensorlm.launching import ROOT, RunTraining

# Run by an interpreter that cannot import this project: -I and a finder that refuses its packages.
GENERATE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorlm", "tensor_attention", "fold_parallel"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM
folder, tokens, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert "tensor_attention" not in sys.modules
prompt = torch.load(tokens)
mask = torch.ones_like(prompt)
mask[1, :9] = 0
kwargs = dict(attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0)
kwargs["eos_token_id"] = None
result = {
    "logits": model(prompt[:1]).logits.detach(),
    "cached": model.generate(prompt, use_cache=True, **kwargs),
    "uncached": model.generate(prompt, use_cache=False, **kwargs),
    "chunked": model.generate(prompt, use_cache=True, prefill_chunk_size=23, **kwargs),
    "beams": model.generate(prompt, use_cache=True, num_beams=3, **kwargs),
    "beams_uncached": model.generate(prompt, use_cache=False, num_beams=3, **kwargs),
    "alone": model.generate(prompt[1:, 9:], **{**kwargs, "attention_mask": mask[1:, 9:]}),
}
torch.save(result, out)
"""


def test_exported_folder_gives_our_logits_and_cached_tokens_without_this_project(
    tmp_path: Path, config: Path, run_training: RunTraining, data: Path
) -> None:
    run_training("train.steps=12", "model.fold=[4,8]", ranks=1, launcher="python")
    settings = load_config(config, ["model.fold=[4,8]"])
    checkpoint = select_checkpoint(tmp_path / "run", None)
    export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", data / "tokenizer")

    prompt = torch.randint(3, 512, (2, 90))
    torch.save(prompt, tmp_path / "prompt.pt")
    arguments = [str(tmp_path / "hf"), str(tmp_path / "prompt.pt"), str(tmp_path / "out.pt")]
    subprocess.run(
        [sys.executable, "-I", "-c", GENERATE, *arguments], check=True, cwd=tmp_path, timeout=120
    )
    result = torch.load(tmp_path / "out.pt")

    model = Llama(settings.model)
    load_weights(checkpoint, model)
    torch.testing.assert_close(result["logits"], model(prompt[:1]), rtol=1e-4, atol=1e-4)
    assert torch.equal(result["cached"], result["uncached"])
    assert torch.equal(result["chunked"], result["uncached"])
    assert torch.equal(result["beams"], result["beams_uncached"])
    assert torch.equal(
        result["alone"][0], result["uncached"][1, 9:]
    )  # left padding changes nothing


def tiny_llama() -> LlamaForCausalLM:
    """Random weights in the shape of the tiny configuration."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )


def test_imported_llama_weights_give_its_logits(tmp_path: Path, config: Path) -> None:
    reference = tiny_llama()
    reference.save_pretrained(tmp_path / "llama")
    settings = load_config(config, ["model.fold=[]"])
    import_weights(tmp_path / "llama", settings)
    model = Llama(settings.model)
    load_weights(select_checkpoint(tmp_path / "run", None), model)
    tokens = torch.randint(512, (1, 70))
    torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=1e-5, atol=1e-5)


def test_training_starts_from_imported_weights(
    tmp_path: Path, config: Path, run_training: RunTraining
) -> None:
    reference = tiny_llama()
    reference.save_pretrained(tmp_path / "llama")
    command = [sys.executable, "launcher/convert.py", "import", "--config", str(config)]
    subprocess.run([*command, "--hf", str(tmp_path / "llama")], cwd=ROOT, check=True)
    run_training("train.stop_at=1", "optim.lr=1e-12", ranks=1, launcher="python")
    after = select_checkpoint(tmp_path / "run", 1)
    name = "layers.0.self_attn.q_proj.weight"
    wanted = reference.state_dict()[f"model.{name}"]
    torch.testing.assert_close(after.read_parameter(name), wanted, rtol=0, atol=1e-6)


def test_evaluation_writes_a_report_and_refuses_lengths_without_text(
    tmp_path: Path, config: Path, run_training: RunTraining
) -> None:
    run_training("train.stop_at=2", ranks=1, launcher="python")
    command = [sys.executable, "launcher/evaluate.py", "--config", str(config)]
    result = subprocess.run(
        [*command, "--lengths", "64,128,256"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "perplexity" in result.stdout
    report = tmp_path / "run/eval/step-00000002"
    assert (report / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert (report / "report.json").exists()
    too_long = subprocess.run(
        [*command, "--lengths", "1048576"], cwd=ROOT, capture_output=True, text=True
    )
    assert too_long.returncode == 2
    assert too_long.stderr.splitlines()[-1].startswith("error: --lengths: no document")
