"""A folder is read as transformers reads it: the same rotary scaling, files and values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tensorlm.checkpoint import list_steps, load_weights, open_checkpoint
from tensorlm.config import Config, load_config
from tensorlm.hf.import_folder import import_weights
from tensorlm.hf.load_folder import load_folder
from tensorlm.model import Llama
from tensorlm.runtime.errors import UserError
from tests.support.hf_models import launcher_here, relative_error, tiny_llama

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
NAME = "model.layers.1.mlp.up_proj.weight"


def folder_with(path: Path, **fields: Any) -> Path:
    """A Llama folder whose config.json has these fields too; None takes one away."""
    tiny_llama(max_position_embeddings=512).save_pretrained(path)
    content = json.loads((path / "config.json").read_text()) | fields
    present = {key: value for key, value in content.items() if value is not None}
    (path / "config.json").write_text(json.dumps(present))
    return path


def imported_model(folder: Path, settings: Config) -> Llama:
    model = Llama(settings.model)
    load_weights(open_checkpoint(import_weights(folder, settings)), model)
    return model


def same_logits(model: Llama, folder: Path) -> bool:
    tokens = torch.randint(512, (2, 300), generator=torch.Generator().manual_seed(1))
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return relative_error(model(tokens), theirs(tokens).logits) < 1e-5


# ----------------------------------------------------------------------------------------- rotary

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
# What config.json says about rotary embedding, and the settings that transformers makes of it.
ROPE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "scaling beside parameters": (
        {"rope_parameters": DEFAULT_ROPE, "rope_scaling": LINEAR},
        {"rope_theta": 10000.0, "rope_scaling": LINEAR},
    ),
    "scaling, parameters and theta": (
        {"rope_parameters": DEFAULT_ROPE, "rope_scaling": LINEAR, "rope_theta": 3000.0},
        {"rope_theta": 3000.0, "rope_scaling": LINEAR},
    ),
    "theta in the scaling": (
        {"rope_scaling": LINEAR | {"rope_theta": 700.0}, "rope_theta": 3000.0},
        {"rope_theta": 700.0, "rope_scaling": LINEAR},
    ),
    "llama3 beside parameters": (
        {
            "rope_parameters": DEFAULT_ROPE | LINEAR,
            "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64},
        },
        {
            "rope_theta": 10000.0,
            "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64},
        },
    ),
    "empty scaling": (
        {"rope_parameters": DEFAULT_ROPE | LINEAR, "rope_scaling": {}},
        {"rope_theta": 500000.0, "rope_scaling": LINEAR},
    ),
    "default scaling": (
        {"rope_parameters": DEFAULT_ROPE | LINEAR, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": 10000.0},
    ),
}


@pytest.mark.parametrize("case", ROPE)
def test_rotary_settings_have_transformers_precedence(
    tmp_path: Path, config: Path, case: str
) -> None:
    fields, wanted = ROPE[case]
    folder = folder_with(tmp_path / "llama", **fields)
    changes = [f"model.rope_theta={wanted['rope_theta']}"]
    changes += [
        f"model.rope_scaling.{key}={json.dumps(value)}"
        for key, value in wanted.get("rope_scaling", {}).items()
    ]
    model = imported_model(folder, load_config(config, ["model.fold=[]", *changes]))
    assert same_logits(model, folder)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "got dynamic"),
        ({"rope_type": "yarn", "factor": 2.0}, "got yarn"),
        ({"type": "longrope", "factor": 2.0}, "got longrope"),
        ({"rope_type": "proportional", "factor": 2.0}, "got proportional"),
        ({"rope_type": "linear"}, "factor is missing"),
        (LLAMA3, "original_max_position_embeddings is missing"),
        ({"rope_type": "linear", "factor": 0.5}, "factor: must be at least 1, got 0.5"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor: must be above low_freq_factor"),
    ],
)
def test_other_scaling_is_refused_beside_parameters_too(
    tmp_path: Path, config: Path, scaling: dict[str, Any], message: str
) -> None:
    folder = folder_with(tmp_path / "llama", rope_parameters=DEFAULT_ROPE, rope_scaling=scaling)
    with pytest.raises(UserError, match=message):
        import_weights(folder, load_config(config, ["model.fold=[]"]))


def test_class_that_transformers_would_load_is_the_one_that_counts(
    tmp_path: Path, config: Path
) -> None:
    folder = folder_with(tmp_path / "llama", model_type="qwen2")
    with pytest.raises(UserError, match="model_type must be llama or tensorlm, got qwen2"):
        import_weights(folder, load_config(config, ["model.fold=[]"]))


# ------------------------------------------------------------------------------------------ files


def stale_index(folder: Path) -> None:
    """Saved in three files, then again in one: the index of the first save stays behind."""
    model = tiny_llama()
    model.save_pretrained(folder, max_shard_size="20KB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()


def stale_single_file(folder: Path) -> None:
    """One file and a whole set of shards: transformers reads the one file."""
    model = tiny_llama()
    model.save_pretrained(folder, max_shard_size="20KB")
    one = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    save_file(one, folder / "model.safetensors", {"format": "pt"})


def file_of_its_own(folder: Path) -> None:
    """config.json names the file."""
    folder_with(folder, transformers_weights="other.safetensors")
    weights = load_file(folder / "model.safetensors")
    other = {name: tensor * 1.5 for name, tensor in weights.items()}
    save_file(other, folder / "other.safetensors", {"format": "pt"})


def shards_in_a_folder(folder: Path) -> None:
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    (folder / "parts").mkdir()
    for path in folder.glob("model-*.safetensors"):
        path.rename(folder / "parts" / path.name)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"parts/{file}" for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_beside(folder: Path) -> None:
    tiny_llama().save_pretrained(folder)
    other = {name: tensor * 1.5 for name, tensor in tiny_llama().state_dict().items()}
    torch.save(other, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "make", [stale_index, stale_single_file, file_of_its_own, shards_in_a_folder, pickle_beside]
)
def test_weights_come_from_the_file_that_transformers_reads(
    tmp_path: Path, config: Path, make: Any
) -> None:
    folder = tmp_path / "llama"
    make(folder)
    settings = load_config(config, ["model.fold=[]"])
    wanted = LlamaForCausalLM.from_pretrained(folder).state_dict()
    imported = imported_model(folder, settings).state_dict()
    found = load_folder(folder).state_dict()
    for name, tensor in wanted.items():
        assert torch.equal(imported[name.removeprefix("model.")], tensor), name
        assert torch.equal(found[name], tensor), name


def only_pickle(folder: Path) -> None:
    pickle_beside(folder)
    (folder / "model.safetensors").unlink()


def file_outside(folder: Path) -> None:
    folder_with(folder, transformers_weights="../other.safetensors")


def file_of_another_kind(folder: Path) -> None:
    folder_with(folder, transformers_weights="weights.bin")


def shards_outside(folder: Path) -> None:
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {NAME: "../x.safetensors"}}))


def adapter_beside(folder: Path) -> None:
    tiny_llama().save_pretrained(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (only_pickle, r"must contain model\.safetensors or its index, got pytorch_model\.bin"),
        (file_outside, "transformers_weights must be a safetensors file in this folder"),
        (file_of_another_kind, "transformers_weights must be a safetensors file in this folder"),
        (shards_outside, "must be an index of weights"),
        (adapter_beside, "adapter"),
    ],
)
def test_files_that_are_not_ours_are_refused_alike_everywhere(
    tmp_path: Path, config: Path, make: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "llama"
    make(folder)
    with pytest.raises(UserError, match=message) as refused:
        import_weights(folder, load_config(config, ["model.fold=[]"]))
    with pytest.raises(UserError) as again:
        load_folder(folder)
    assert again.value.problems == refused.value.problems


# ----------------------------------------------------------------------------------------- values


def spoil(folder: Path, value: float, dtype: torch.dtype) -> None:
    tiny_llama().to(dtype).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights[NAME][3, 3] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_that_is_not_finite_is_named(
    tmp_path: Path, config: Path, value: str, dtype: torch.dtype
) -> None:
    folder = tmp_path / "llama"
    spoil(folder, float(value), dtype)
    problem = rf"llama: {NAME} must be finite, got {value} \(fetch the folder again\)"
    with pytest.raises(UserError, match=problem):
        import_weights(folder, load_config(config, ["model.fold=[]"]))
    with pytest.raises(UserError, match=problem):
        load_folder(folder)


def test_import_that_fails_halfway_leaves_no_trace_of_an_import(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(tmp_path / "llama", float("nan"), torch.float32)
    arguments = ("--config", config, "--hf", tmp_path / "llama", "model.fold=[]")
    assert launcher_here("convert.py", "import", *arguments) == 2
    *_, line = capsys.readouterr().err.splitlines()  # bars are before it
    assert line.startswith(f"error: {tmp_path / 'llama'}: {NAME} must be finite, got nan (")
    assert not list_steps(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"lock"}
