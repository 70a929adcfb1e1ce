"""Import: a Hugging Face Llama folder becomes checkpoint step 0 of a run, a few tensors at a time.

Names, shapes and types of all weights are checked from the files' headers before any is read.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tensorlm.config import Config, ModelConfig
from tensorlm.data.tokenizers import TOKENIZER_FILES
from tensorlm.errors import UserError
from tensorlm.hf.export_folder import CHAT_TEMPLATE, hf_config, hf_name
from tensorlm.manifest import list_steps
from tensorlm.model import Llama
from tensorlm.progress import byte_bar
from tensorlm.publish import write_weights

_DTYPES = ("BF16", "F16", "F32")
# Tensors that old folders hold beside the weights, and that say nothing new.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_CARRIED = ("config.json", "generation_config.json", CHAT_TEMPLATE, *TOKENIZER_FILES)
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tie_embeddings",
}
_FOLD_FIELDS = {"fold": "fold", "full_every": "full_every"}


def import_weights(folder: Path, config: Config) -> Path:
    """Turn a Llama folder, or one that we exported, into checkpoint step 0 of `config.run.dir`.

    Adam starts at zero, and so do hop biases at `hop_bias_init` where the folder has none. The
    tokenizer and the settings of the folder are kept in the run, for the export to come.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the folder's shape is not the configured one (a line per setting), its
            architecture has parts that are not ours, weights are missing, strange or of another
            shape, or the run has checkpoints already.
    """
    run_dir = Path(config.run.dir)
    if list_steps(run_dir):
        raise UserError(f"{run_dir}: has checkpoints already (choose a new run.dir)")
    check_config(folder, config.model)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in Llama(config.model).named_parameters()}
    files = _check_weights(folder, shapes)

    def parameters() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            if hf_name(name) not in files:
                yield name, torch.full(shape, config.model.hop_bias_init)
                continue
            with safe_open(files[hf_name(name)], "pt") as file:
                yield name, file.get_tensor(hf_name(name)).float()

    info = {
        "state": {"step": 0, "rows": 0, "tokens": 0},
        "adam_step": 0,
        "adam_state": False,
        "config": config.model_dump(mode="json", exclude_none=True),
        "data_fingerprint": "",
        "imported_from": folder.resolve().name,
    }
    _carry(folder, run_dir / "imported" / folder.resolve().name)
    total = sum(4 * math.prod(shape) for shape in shapes.values())
    with byte_bar(total, f"import {folder.resolve().name}") as moved:
        return write_weights(run_dir, parameters(), info, moved)


def imported_folder(run_dir: Path) -> Path | None:
    """Tokenizer and settings of the folder that a run was imported from, under its name."""
    return next(iter(sorted((run_dir / "imported").glob("*/"))), None)


def _carry(folder: Path, target: Path) -> None:
    shutil.rmtree(target.parent, ignore_errors=True)  # of an import that failed
    target.mkdir(parents=True)
    for name in _CARRIED:
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)


# ------------------------------------------------------------------------------------ config.json


def check_config(folder: Path, model: ModelConfig) -> None:
    """Compare a folder's config.json with the configured model.

    Raises:
        UserError: a line per difference, each with the setting that would mend it.
    """
    try:
        found = dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{folder}: no readable config.json (not a Hugging Face folder?)") from None
    problems = _strange_parts(found)
    if problems:
        raise UserError(*(f"{folder}: {problem}" for problem in problems))
    rope = _rope(found)
    found = _with_defaults(found) | {"rope_theta": rope.pop("rope_theta")}
    wanted = hf_config(model, 0, "fp32")
    fields = _FIELDS | (_FOLD_FIELDS if found.get("model_type") == "tensorlm" else {})
    pairs = {ours: (wanted.get(theirs), found.get(theirs)) for theirs, ours in fields.items()}
    scaling = wanted.get("rope_scaling", {"rope_type": "default"})
    if rope["rope_type"] == "default" != scaling["rope_type"]:
        raise UserError(f"{folder}: has no rope_scaling (remove model.rope_scaling)")
    pairs |= {f"rope_scaling.{key}": (scaling.get(key), value) for key, value in rope.items()}
    problems = [
        f"model.{key}: is {json.dumps(ours)}, {folder} has {json.dumps(theirs)} "
        f"(set model.{key}={json.dumps(theirs)})"
        for key, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    if problems:
        raise UserError(*problems)


def _strange_parts(found: dict[str, Any]) -> list[str]:
    """What makes this another architecture than ours."""
    architectures = found.get("architectures") or []
    problems = []
    if not {"LlamaForCausalLM", "TensorLMForCausalLM"} & set(architectures):
        problems.append(f"architectures {architectures}, not LlamaForCausalLM")
    for key in ("attention_bias", "mlp_bias"):
        if found.get(key):
            problems.append(f"{key} is set: our projections have no bias")
    if found.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {found['hidden_act']}, ours is silu")
    if found.get("quantization_config"):
        problems.append("quantized weights (import the unquantized folder)")
    if _rope(found)["rope_type"] not in ("default", "linear", "llama3"):
        problems.append(
            f"rope_scaling of type {_rope(found)['rope_type']} (ours: default, linear, llama3)"
        )
    return problems


def _rope(found: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, from 5.x's `rope_parameters` or 4.x's `rope_theta` and `rope_scaling`."""
    rope = dict(found.get("rope_parameters") or found.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    rope.setdefault("rope_theta", found.get("rope_theta") or 10000.0)
    if rope["rope_type"] == "linear":  # the only number that it reads
        rope = {key: rope.get(key) for key in ("rope_type", "rope_theta", "factor")}
    return rope


def _with_defaults(found: dict[str, Any]) -> dict[str, Any]:
    """Fields that a Llama's config.json may leave out."""
    heads = found.get("num_attention_heads") or 1
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": found.get("hidden_size", 0) // heads,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    given = {key: value for key, value in found.items() if value is not None}
    return defaults | given


# ---------------------------------------------------------------------------------------- weights


def _check_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Path]:
    """File of every weight, after a look at the headers of all files.

    Raises:
        UserError: a line for each file that cannot be read; for missing and strange weights the
            first of them; for weights of another shape or type.
    """
    found: dict[str, tuple[Path, list[int], str]] = {}
    problems = []
    for path in _weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    piece = file.get_slice(name)
                    found[name] = (path, list(piece.get_shape()), piece.get_dtype())
        except (OSError, SafetensorError) as error:
            problems.append(f"{path}: {str(error).splitlines()[0]} (fetch the file again)")
    if problems:
        raise UserError(*problems)
    expected = {hf_name(name): list(shape) for name, shape in shapes.items()}
    has_bias = any(name.endswith("hop_bias") for name in found)
    needed = [name for name in expected if has_bias or not name.endswith("hop_bias")]
    tied = "lm_head.weight" not in expected
    missing = [name for name in needed if name not in found]
    strange = [
        name
        for name in found
        if not (name in expected or _IGNORED.match(name) or (tied and name == "lm_head.weight"))
    ]
    for what, names in (("missing", missing), ("not a Llama's", strange)):
        if names:
            problems.append(f"{folder}: {len(names)} weights are {what}, first {names[0]}")
    for name, (path, shape, dtype) in found.items():
        if shape != expected.get(name, shape):
            problems.append(f"{path}: {name} is {shape}, expected {expected[name]}")
        if dtype not in _DTYPES:
            problems.append(f"{path}: {name} is {dtype} (needs one of {', '.join(_DTYPES)})")
    if problems:
        raise UserError(*problems)
    return {name: path for name, (path, _, _) in found.items()}


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of the index, or the single one."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        try:
            files = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: not an index of weights (fetch the file again)") from None
        return sorted(folder / Path(file).name for file in files)
    if not single.exists():
        raise UserError(f"{folder}: no model.safetensors and no index (save it as safetensors)")
    return [single]
