"""Import: every Llama's shape gives its logits and its bytes back; what is not ours is refused."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tensorlm.checkpoint import list_steps, load_weights, open_checkpoint, select_checkpoint
from tensorlm.config import Config, load_config
from tensorlm.data.tokenizer.tokenizers import load_tokenizer
from tensorlm.hf.export_folder import export_checkpoint
from tensorlm.hf.import_folder import import_weights, imported_folder
from tensorlm.model import Llama
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.lock import lock_run
from tests.support.hf_models import (
    assert_same_bytes,
    folder_weights,
    launcher_here,
    random_checkpoint,
    relative_error,
    tiny_llama,
)
from tests.support.launching import TrainRanks

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3_OVERRIDES = [
    f"model.rope_scaling.{key}={json.dumps(value)}"
    for key, value in LLAMA3_ROPE.items()
    if key != "rope_theta"
]
# Shape of the model, what the configuration says about it.
SHAPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama2": ({"num_key_value_heads": 4}, ["model.num_kv_heads=4"]),
    "llama3": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        ["model.rope_theta=500000.0"],
    ),
    "llama3.1": (
        {"rope_parameters": LLAMA3_ROPE},
        ["model.rope_theta=500000.0", *LLAMA3_OVERRIDES],
    ),
    "llama3.2": (
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 16},
        [
            "model.rope_theta=500000.0",
            "model.tie_embeddings=true",
            "model.head_dim=16",
            *LLAMA3_OVERRIDES,
        ],
    ),
    "linear": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        ['model.rope_scaling.rope_type="linear"', "model.rope_scaling.factor=4.0"],
    ),
}


def full_attention_run(config: Path, *overrides: str) -> Config:
    return load_config(config, ["model.fold=[]", *overrides])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_gives_its_logits_in_our_model_and_its_bytes_back(
    tmp_path: Path, config: Path, shape: str, sharded: bool, dtype: str
) -> None:
    changes, overrides = SHAPES[shape]
    reference = tiny_llama(**changes)
    if dtype == "bf16":
        reference = reference.to(torch.bfloat16)
    size = "20KB" if sharded else "5GB"
    reference.save_pretrained(tmp_path / "llama", max_shard_size=size)
    assert (tmp_path / "llama/model.safetensors.index.json").exists() == sharded

    settings = full_attention_run(config, *overrides)
    checkpoint = open_checkpoint(import_weights(tmp_path / "llama", settings))
    model = Llama(settings.model)
    load_weights(checkpoint, model)
    tokens = torch.randint(512, (2, 130))
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
        assert relative_error(model(tokens), wanted(tokens).logits) < 1e-5

    shard_bytes = 20_000 if sharded else 5 * 10**9
    output = tmp_path / "back"
    export_checkpoint(checkpoint, settings, output, dtype, None, shard_bytes=shard_bytes)
    assert_same_bytes(folder_weights(output), folder_weights(tmp_path / "llama"))
    first, again = (LlamaForCausalLM.from_pretrained(d) for d in (tmp_path / "llama", output))
    assert again.dtype == first.dtype
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, first(tokens).logits)


def test_folded_folder_comes_back_with_its_hop_biases(tmp_path: Path, config: Path) -> None:
    checkpoint, settings, _ = random_checkpoint(config, "model.fold=[4,8]")
    export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", None)
    second = load_config(config, ["model.fold=[4,8]", f"run.dir={tmp_path / 'second'}"])
    imported = open_checkpoint(import_weights(tmp_path / "hf", second))
    export_checkpoint(imported, second, tmp_path / "again", "fp32", None)
    assert any(name.endswith("hop_bias") for name in folder_weights(tmp_path / "again"))
    assert_same_bytes(folder_weights(tmp_path / "again"), folder_weights(tmp_path / "hf"))
    other = load_config(config, ["model.fold=[8]", f"run.dir={tmp_path / 'third'}"])
    with pytest.raises(UserError, match=r"model.fold: must be \[4, 8\], as in .*hf, got \[8\]"):
        import_weights(tmp_path / "hf", other)


def test_old_folders_config_fields_and_buffers_are_understood(tmp_path: Path, config: Path) -> None:
    folder = tmp_path / "llama"
    tiny_llama(num_key_value_heads=4).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings"):
        fields.pop(name)  # as in Llama-2's first folders
    fields |= {"rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(fields))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors")
    overrides = ['model.rope_scaling={rope_type="linear", factor=2.0}', "model.num_kv_heads=4"]
    import_weights(folder, full_attention_run(config, *overrides))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dynamic": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        r"rope_scaling must be of type default, linear, llama3, got dynamic",
    ),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "got yarn"),
    "mistral": ({"architectures": ["MistralForCausalLM"]}, "must include LlamaForCausalLM, got"),
    "bias": ({"attention_bias": True}, "attention_bias must be false"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act must be silu, got gelu"),
    "quantized": ({"quantization_config": {"bits": 4}}, "must not be quantized"),
    "incomplete": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
        r"config.json: rope_parameters: high_freq_factor is missing\n.*original_max_position",
    ),
    "partial": (
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        r"partial_rotary_factor must be 1, got 0.5$",
    ),
    "text for a number": (
        {"num_attention_heads": "4"},
        r"config.json: num_attention_heads: must be an integer, got \"4\"$",
    ),
    "null": ({"hidden_size": None}, r"config.json: hidden_size: missing$"),
    "rope is text": (
        {"rope_parameters": "x"},
        r"config.json: rope_parameters: must be a table, got \"x\"$",
    ),
    "rope has text": (
        {"rope_parameters": {"rope_type": "linear", "factor": "8"}},
        r"config.json: rope_parameters.factor: must be a number, got \"8\"$",
    ),
    "flag": ({"tie_word_embeddings": 1}, "tie_word_embeddings: must be true or false, got 1"),
    "layers": (
        {"num_hidden_layers": 3},
        r"model.num_layers: must be 3, as in .*, got 2 \(set model.num_layers=3\)",
    ),
    "tied": ({"tie_word_embeddings": True}, r"\(set model.tie_embeddings=true\)"),
    "theta": ({"rope_parameters": {"rope_theta": 5e5}}, r"\(set model.rope_theta=500000.0\)"),
    "scaled": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        r'\(set model.rope_scaling.rope_type="linear"\)\n.*model.rope_scaling.factor=2.0',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configuration_that_is_not_ours_is_refused(tmp_path: Path, config: Path, case: str) -> None:
    changes, message = REFUSED[case]
    folder = tmp_path / "llama"
    tiny_llama().save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message):
        import_weights(folder, full_attention_run(config))
    assert not list_steps(tmp_path / "run")


def drop_one(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.norm.weight"]


def add_one(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)


def cut_one(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones(31)


def integers(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones(32, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_one, "1 weights are missing, first model.norm.weight"),
        (add_one, "1 weights are not part of a Llama, first model.layers.0.self_attn.q_proj.bias"),
        (cut_one, r"model.norm.weight must have shape \[32\], got \[31\]"),
        (integers, "model.norm.weight must be BF16, F16, F32, got I8"),
    ],
)
def test_weights_are_checked_before_anything_is_written(
    tmp_path: Path, config: Path, change: Any, message: str
) -> None:
    folder = tmp_path / "llama"
    tiny_llama().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        import_weights(folder, full_attention_run(config))
    assert not (tmp_path / "run").exists()


def test_stored_head_of_a_tied_model_must_be_its_embedding(tmp_path: Path, config: Path) -> None:
    folder = tmp_path / "llama"
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    settings = full_attention_run(config, "model.tie_embeddings=true")
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    changed = head.clone()
    changed[-1, -1] += 1
    for other in (changed, head[:-1].clone()):
        save_file(weights | {"lm_head.weight": other}, folder / "model.safetensors")
        with pytest.raises(UserError, match=r"lm_head\.weight must be the embedding"):
            import_weights(folder, settings)
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors")
    checkpoint = open_checkpoint(import_weights(folder, settings))
    assert torch.equal(checkpoint.read_parameter("embed_tokens.weight"), head)


def test_half_precision_becomes_the_same_numbers(tmp_path: Path, config: Path) -> None:
    reference = tiny_llama().half()
    reference.save_pretrained(tmp_path / "llama")
    stored = folder_weights(tmp_path / "llama")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    settings = full_attention_run(config)
    checkpoint = open_checkpoint(import_weights(tmp_path / "llama", settings))
    export_checkpoint(checkpoint, settings, tmp_path / "back", "fp32", None)
    wanted = {name: tensor.float() for name, tensor in stored.items()}
    assert_same_bytes(folder_weights(tmp_path / "back"), wanted)


def test_run_that_is_in_use_takes_no_import(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorlm.runtime.lock.PATIENCE_SECONDS", 0.0)
    tiny_llama().save_pretrained(tmp_path / "llama")
    settings = full_attention_run(config)
    descriptor = lock_run(tmp_path / "run")  # as training does, before its first checkpoint
    with pytest.raises(UserError, match=r"run\.dir: .*/run is in use by pid \d+ on "):
        import_weights(tmp_path / "llama", settings)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock"}
    os.close(descriptor)
    import_weights(tmp_path / "llama", settings)
    os.close(lock_run(tmp_path / "run"))  # the import has let go


def test_damaged_and_absent_files_are_named(tmp_path: Path, config: Path) -> None:
    folder, settings = tmp_path / "llama", full_attention_run(config)
    folder.mkdir()
    with pytest.raises(UserError, match=r"must contain a readable config\.json"):
        import_weights(folder, settings)
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:1000])
    shards[1].unlink()
    with pytest.raises(UserError) as error:
        import_weights(folder, settings)
    assert len(error.value.problems) == 2
    assert all(s.name in p for s, p in zip(shards, error.value.problems, strict=False))
    index = folder / "model.safetensors.index.json"
    for content in ('{"weight_map": {"model.norm.weight": 5}}', "[]", "[" * 9999, "\udcff"):
        index.write_text(content, errors="surrogateescape")
        with pytest.raises(UserError, match=r"must be an index of weights"):
            import_weights(folder, settings)
    index.unlink()
    with pytest.raises(UserError, match=r"must contain model\.safetensors or its index"):
        import_weights(folder, settings)


def test_long_conversions_show_how_far_they_are(
    tmp_path: Path,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tensorlm.runtime.progress.DELAY_SECONDS", 0.0)
    tiny_llama().save_pretrained(tmp_path / "Tiny-Llama")
    full = ("--config", config, "model.fold=[]")
    imported = launcher_here("convert.py", "import", *full, "--hf", tmp_path / "Tiny-Llama")
    exported = launcher_here("convert.py", "export", *full, "--output", tmp_path / "hf")
    assert imported == exported == 0
    bars = capsys.readouterr().err
    for title in ("import Tiny-Llama", "verify step-00000000", "export step 0"):
        assert re.search(rf"{title}: 100%\|#+\| (\S+)/\1 \[", bars), bars


def test_training_starts_from_imported_weights_and_exports_their_tokenizer(
    tmp_path: Path,
    config: Path,
    data: Path,
    train_ranks: TrainRanks,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = tiny_llama()
    folder = tmp_path / "Tiny-Llama"
    reference.generation_config.eos_token_id = [2, 7]
    reference.save_pretrained(folder)
    load_tokenizer(data / "tokenizer").save_pretrained(folder)
    assert launcher_here("convert.py", "import", "--config", config, "--hf", folder) == 0
    # It was saved as tokenizer.json, the data set's is a tokenizer.model.
    assert "was encoded with another tokenizer" in capsys.readouterr().out
    assert imported_folder(tmp_path / "run") == tmp_path / "run/imported/Tiny-Llama"
    printed = train_ranks("train.stop_at=1", "optim.lr=1e-12", ranks=1)
    assert f"run {tmp_path / 'run'}: from imported weights, 8 steps" in printed
    note = f"note: {data} was encoded with another tokenizer than that of {tmp_path / 'run'}"
    assert f"{note}/imported/Tiny-Llama" in printed
    assert "their ids are the same for all compared texts" in printed
    after = select_checkpoint(tmp_path / "run", 1)
    name = "layers.0.self_attn.q_proj.weight"
    wanted = reference.state_dict()[f"model.{name}"]
    torch.testing.assert_close(after.read_parameter(name), wanted, rtol=0, atol=1e-6)

    export = ("export", "--config", config, "--output", tmp_path / "hf", "data.path=elsewhere")
    assert launcher_here("convert.py", *export) == 2
    (line,) = capsys.readouterr().err.splitlines()
    carried = tmp_path / "run/imported/Tiny-Llama"
    what = f"{carried}: must be the tokenizer with which the data was encoded"
    assert line == f"error: {what} (choose one with --tokenizer DIR)"
    assert not (tmp_path / "hf").exists()
    assert launcher_here("convert.py", *export, "--tokenizer", carried) == 0
    assert f"note: {what} (as requested)\n" in capsys.readouterr().out
    text = "def main():\n    return 'ünïcode'"
    wanted_ids = load_tokenizer(folder).encode(text)
    assert load_tokenizer(tmp_path / "hf").encode(text) == wanted_ids
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 7]
    assert "Tiny-Llama" in (tmp_path / "hf/README.md").read_text()
