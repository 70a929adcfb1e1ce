"""Weights to and from Hugging Face folders, one parameter at a time.

Our parameter names are Llama's without the leading `model.`.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import tensor_attention
from tensorlm.config import Config, ModelConfig
from tensorlm.data.tokenizers import copy_tokenizer, load_tokenizer
from tensorlm.errors import UserError
from tensorlm.manifest import Checkpoint
from tensorlm.model import Llama
from tensorlm.publish import write_weights

_SHARD_BYTES = 5 * 10**9
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CARRIED_OPERATOR_FILES = ("fold.py", "blocked.py", "cached.py")
_CARRIED_MODEL_FILES = ("configuration_tensorlm.py", "modeling_tensorlm.py")


def hf_name(name: str) -> str:
    """Hugging Face's name of one of our parameters."""
    return name if name.startswith("lm_head.") else f"model.{name}"


# ------------------------------------------------------------------------------------------ export


def export_checkpoint(
    checkpoint: Checkpoint, config: Config, output: Path, dtype: str, tokenizer: Path | None
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        checkpoint: verified checkpoint of any world size and ZeRO stage.
        config: its configuration.
        output: folder to write, new or empty.
        dtype: "bf16" or "fp32", of the weights.
        tokenizer: folder whose tokenizer goes along.

    Raises:
        UserError: the output folder is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: is not empty (choose another --output)")
    output.mkdir(parents=True, exist_ok=True)
    _write_shards(checkpoint, output, _DTYPES[dtype])
    ids = {}
    if tokenizer is not None:
        copy_tokenizer(tokenizer, output)
        loaded = load_tokenizer(output)  # before config.json, whose auto_map asks for trust
        ids = {"bos_token_id": loaded.bos_token_id, "eos_token_id": loaded.eos_token_id}
    _write_json(output / "config.json", hf_config(config.model, config.data.seq_len, dtype) | ids)
    _write_json(output / "generation_config.json", ids)
    if config.model.fold:
        operator = Path(tensor_attention.__file__).parent
        for name in _CARRIED_OPERATOR_FILES:
            shutil.copyfile(operator / name, output / name)
        for name in _CARRIED_MODEL_FILES:
            shutil.copyfile(Path(__file__).parent / name, output / name)
    (output / "README.md").write_text(_model_card(checkpoint, config))


def hf_config(model: ModelConfig, seq_len: int, dtype: str) -> dict[str, Any]:
    """`config.json` of a model, with the 4.x field names that every version reads."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
    }
    if model.rope_scaling is not None:
        config["rope_scaling"] = model.rope_scaling.model_dump()
    if model.fold:
        config |= {
            "architectures": ["TensorLMForCausalLM"],
            "model_type": "tensorlm",
            "auto_map": {
                "AutoConfig": "configuration_tensorlm.TensorLMConfig",
                "AutoModelForCausalLM": "modeling_tensorlm.TensorLMForCausalLM",
            },
            "fold": list(model.fold),
            "full_every": model.full_every,
        }
    return config


def _write_shards(checkpoint: Checkpoint, output: Path, dtype: torch.dtype) -> None:
    """All parameters, in files of at most 5 GB, with the index that names them."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in checkpoint.shapes.items():
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if groups[-1] and size + num_bytes > _SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    weight_map: dict[str, str] = {}
    for index, names in enumerate(groups):
        file = f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        file = file if len(groups) > 1 else "model.safetensors"
        tensors = {hf_name(n): checkpoint.read_parameter(n).to(dtype) for n in names}
        save_file(tensors, output / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(groups) > 1:
        numel = sum(torch.Size(shape).numel() for shape in checkpoint.shapes.values())
        total = {"total_size": numel * dtype.itemsize}
        index_path = output / "model.safetensors.index.json"
        _write_json(index_path, {"metadata": total, "weight_map": weight_map})


def _model_card(checkpoint: Checkpoint, config: Config) -> str:
    state, model = checkpoint.manifest["state"], config.model
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# tensorlm model

A Llama decoder with {"tensorized attention" if model.fold else "full attention"}: fold
`{list(model.fold)}`, {model.num_layers} layers, hidden size {model.hidden_size}, vocabulary
{model.vocab_size}. Trained for {state["step"]} steps on {state["tokens"]:,} tokens in rows of
{config.data.seq_len:,}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code={bool(model.fold)})
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```
"""


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


# ------------------------------------------------------------------------------------------ import


def import_weights(folder: Path, config: Config) -> Path:
    """Turn a Llama folder into checkpoint step 0 of `config.run.dir`; returns its folder.

    Hop biases start at `hop_bias_init`, Adam at zero. Memory: one group of parameters at a time.

    Raises:
        UserError: the shape in the folder's config.json is not the configured one (a line per
            field), weights are missing, or the run has checkpoints already.
    """
    _check_shape(folder, config.model)
    files = _weight_files(folder)
    with torch.device("meta"):
        expected = {n: tuple(p.shape) for n, p in Llama(config.model).named_parameters()}
    missing = [n for n in expected if hf_name(n) not in files and not n.endswith("hop_bias")]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} weights are missing, first {hf_name(missing[0])}"
        )

    def parameters() -> Iterator[tuple[str, Tensor]]:
        for name, shape in expected.items():
            if name.endswith("hop_bias"):
                yield name, torch.full(shape, config.model.hop_bias_init)
                continue
            with safe_open(files[hf_name(name)], "pt") as file:
                tensor = file.get_tensor(hf_name(name))
            if tuple(tensor.shape) != shape:
                raise UserError(
                    f"{folder}: {hf_name(name)} is {tuple(tensor.shape)}, expected {shape}"
                )
            yield name, tensor.float()

    info = {
        "state": {"step": 0, "rows": 0, "tokens": 0},
        "adam_step": 0,
        "adam_state": False,
        "config": config.model_dump(mode="json", exclude_none=True),
        "data_fingerprint": "",
        "imported_from": folder.name,
    }
    return write_weights(Path(config.run.dir), parameters(), info)


def _check_shape(folder: Path, model: ModelConfig) -> None:
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder}: no readable config.json") from None
    if "LlamaForCausalLM" not in (found.get("architectures") or []):
        raise UserError(f"{folder}: architectures {found.get('architectures')}, not a Llama")
    rope = found.get("rope_parameters") or {}
    found.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    wanted = hf_config(model, 0, "fp32")
    names = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "rms_norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "tie_word_embeddings": "tie_embeddings",
    }
    defaults = {
        "num_key_value_heads": found.get("num_attention_heads"),
        "tie_word_embeddings": False,
    }
    problems = [
        f"model.{ours}: is {wanted[theirs]}, {folder} has {found.get(theirs, defaults.get(theirs))}"
        for theirs, ours in names.items()
        if found.get(theirs, defaults.get(theirs)) != wanted[theirs]
    ]
    scaling = found.get("rope_scaling") or (rope if rope.get("rope_type") != "default" else {})
    for key, value in wanted.get("rope_scaling", {"rope_type": None}).items():
        if scaling.get(key) != value:
            problems.append(
                f"model.rope_scaling.{key}: is {value}, {folder} has {scaling.get(key)}"
            )
    if problems:
        raise UserError(*problems)


def _weight_files(folder: Path) -> dict[str, Path]:
    """File of every tensor, from the index or the single file."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {name: folder / Path(file).name for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    if not single.exists():
        raise UserError(f"{folder}: no model.safetensors and no index of shards")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)
