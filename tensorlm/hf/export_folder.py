"""Exporting a checkpoint to a Hugging Face folder, a few megabytes at a time.

Our parameter names are Llama's without the leading `model.`.
"""

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorlm.checkpoint import Checkpoint
from tensorlm.checkpoint.safetensors_file import write_safetensors
from tensorlm.config import Config, ModelConfig
from tensorlm.runtime import disk
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.lock import locked
from tensorlm.runtime.progress import byte_bar

from .export_tokenizer import describe_prompts, write_tokenizer
from .imported_tokenizer import is_same_tokenizer
from .llama_config import FIELDS, max_positions, needs_code
from .model_card import model_card
from .rounding import Rounding, round_part

SHARD_BYTES = 5 * 10**9
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_HF_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CHUNK = 1 << 25  # elements of a parameter in memory at one time


def hf_name(name: str) -> str:
    """Hugging Face's name for one of our parameters."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def export_checkpoint(
    checkpoint: Checkpoint,
    config: Config,
    output: Path,
    dtype: str,
    tokenizer: Path | None,
    *,
    imported: Path | None = None,
    rounding: Rounding = "nearest",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` can load.

    The folder gets its name once it is complete. Memory: one chunk of a parameter.

    Args:
        checkpoint: verified checkpoint of any world size and ZeRO stage.
        config: its configuration.
        output: folder to write, new or empty.
        dtype: dtype of the weights, "bf16" or "fp32".
        tokenizer: folder of the tokenizer to include, or None.
        imported: the run's imported folder (`import_folder.imported_folder`), for its name and
            generation settings, or None.
        rounding: rounding to bf16.
        shard_bytes: maximum size of the weights in one file (a parameter is never split).

    Raises:
        UserError: the output folder is not empty, cannot be written, or is in use by another
            export; or a weight is not finite.
    """
    with _published(output) as folder:
        generation, prompts = _read_generation_config(imported), None
        if tokenizer is not None:
            model_type = "tensorlm" if needs_code(config.model) else "llama"
            loaded = write_tokenizer(tokenizer, folder, imported, model_type)
            prompts = describe_prompts(folder)
            ids = {"bos_token_id": loaded.bos_token_id, "eos_token_id": loaded.eos_token_id}
            if imported is not None and is_same_tokenizer(imported, tokenizer):
                generation = ids | generation  # which may list several end-of-text tokens
            else:
                generation.pop("pad_token_id", None)
                generation |= ids
        _write_shards(checkpoint, folder, DTYPES[dtype], rounding, shard_bytes)
        ids = {key: generation[key] for key in _TOKEN_IDS if key in generation}
        fields = hf_config(config.model, _context_length(checkpoint.step, config, imported), dtype)
        fields |= ids
        write_json(folder / "config.json", fields)
        write_json(folder / "generation_config.json", generation)
        if needs_code(config.model):
            from .modeling_tensorlm import write_code  # slow to import

            write_code(folder)
        name = imported.name if imported else None
        how = f"{dtype}, rounded stochastically" if rounding == "stochastic" else dtype
        card = model_card(checkpoint.manifest, config, how, name, prompts)
        (folder / "README.md").write_text(card)


def _context_length(step: int, config: Config, imported: Path | None) -> int:
    """Context length in tokens: that of the imported model, or of the longest trained rows."""
    starts = itertools.accumulate((phase.steps for phase in config.phases), initial=0)
    begun = [
        phase.seq_len for phase, start in zip(config.phases, starts, strict=False) if start < step
    ]
    if imported is not None and (imported / "config.json").exists():
        begun.append(max_positions(imported))
    return max(begun, default=config.data.seq_len)


def hf_config(model: ModelConfig, seq_len: int, dtype: str) -> dict[str, Any]:
    """`config.json` of a model, with the field names of transformers 4, which all versions read.

    Raises:
        UserError: the model chooses blocks at random.
    """
    if model.route is not None and model.route.choice == "random":
        raise UserError(
            "model.route.choice: must be content to export or generate, got random (random blocks "
            "are a reference for training and perplexity)"
        )
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: getattr(model, ours) for name, ours in FIELDS.items()},
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "rope_theta": model.rope_theta,
        "max_position_embeddings": seq_len,
        "initializer_range": model.init_std,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": _HF_DTYPES[dtype],
    }
    if model.rope_scaling is not None:
        config["rope_scaling"] = model.rope_scaling.model_dump()
    if needs_code(model):
        from .configuration_tensorlm import AUTO_MAP  # slow to import

        ours = model.model_dump(mode="json", exclude={"route": {"choice"}})
        names = ("fold", "full_every", "hop_bias_init", "window", "route", "route_every", "layers")
        config |= {
            "architectures": ["TensorLMForCausalLM"],
            "model_type": "tensorlm",
            "auto_map": AUTO_MAP,
            **{name: ours[name] for name in names},
        }
    return config


def _read_generation_config(imported: Path | None) -> dict[str, Any]:
    """Generation settings of the imported folder; token ids may be only in its config.json."""
    if imported is None:
        return {}
    fields = _read_fields(imported / "config.json")
    ids = {key: fields[key] for key in _TOKEN_IDS if fields.get(key) is not None}
    return ids | _read_fields(imported / "generation_config.json")


def _read_fields(path: Path) -> dict[str, Any]:
    """The content of a folder's JSON file; {} if it does not exist."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError):
        kind = "generation config" if path.name.startswith("generation") else "model config"
        raise UserError(f"{path}: must be a valid {kind} (fix or remove it)") from None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def check_new_folder(output: Path) -> None:
    """Raise UserError unless `output` does not exist or is an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        state = "must be empty" if output.is_dir() else "must be a folder"
        raise UserError(f"{output}: {state} (choose another --output)")


@contextmanager
def _published(output: Path) -> Iterator[Path]:
    """A folder to fill. After the body it is renamed to `output`; on an error it is removed.

    If `output` is a link, its target is filled.
    """
    target = Path(os.path.realpath(output))
    try:
        check_new_folder(output)
        disk.make_folder(target.parent)
        with locked(target.with_name(f".lock-{target.name}"), f"--output: {output}"):
            check_new_folder(output)
            with disk.atomic_folder(target) as folder:
                yield folder
    except OSError as error:
        if error.filename2 == str(target):  # the final rename failed
            raise UserError(
                f"{output}: cannot be replaced ({error.strerror}; the finished export is "
                f"{error.filename}: rename it)"
            ) from None
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from None


def _write_shards(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, rounding: Rounding, shard_bytes: int
) -> None:
    """Write all parameters to safetensors files of at most `shard_bytes`, and their index."""
    shapes = {name: torch.Size(shape) for name, shape in checkpoint.shapes.items()}
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = shape.numel() * dtype.itemsize
        if groups[-1] and size + num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    weight_map: dict[str, str] = {}
    numel = sum(shape.numel() for shape in shapes.values())
    with byte_bar(numel * dtype.itemsize, f"export step {checkpoint.step}") as moved:
        for index, names in enumerate(groups):
            file = f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
            file = file if len(groups) > 1 else "model.safetensors"
            pieces = _pieces(checkpoint, {name: shapes[name] for name in names}, dtype, rounding)
            named = {hf_name(name): shapes[name] for name in names}
            write_safetensors(folder / file, named, dtype, pieces, moved, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(named, file)
    if len(groups) > 1:
        metadata = {"total_size": numel * dtype.itemsize, "total_parameters": numel}
        index_path = folder / "model.safetensors.index.json"
        write_json(index_path, {"metadata": metadata, "weight_map": weight_map})


def _pieces(
    checkpoint: Checkpoint, shapes: dict[str, torch.Size], dtype: torch.dtype, rounding: Rounding
) -> Iterator[Tensor]:
    """The parameters' elements in `dtype`, with only a chunk of a tensor in memory."""
    for name, shape in shapes.items():
        for start in range(0, shape.numel(), _CHUNK):
            part = checkpoint.read(name, "master", start, min(start + _CHUNK, shape.numel()))
            yield round_part(part, dtype, rounding, name, start)
