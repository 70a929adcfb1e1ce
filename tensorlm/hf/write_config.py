"""Writing a run's configuration with the shape of a Hugging Face folder."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from tensorlm.config import apply_override, parse_config, read_tree
from tensorlm.runtime.errors import UserError

from .llama_config import check_config, max_positions, model_settings

_SEQ_LEN = 4096  # maximum data.seq_len without a given configuration
_START: dict[str, Any] = {
    "optim": {"lr": 3e-5, "warmup_steps": 100},
    "train": {"steps": 1000, "rows_per_step": 16},
}


def write_config(folder: Path, base: Path | None, overrides: Sequence[str], output: Path) -> None:
    """Write a configuration whose `[model]` is that of `folder`.

    Args:
        folder: folder with a Llama's config.json.
        base: configuration for the other sections, and for settings that the folder does not
            determine (such as `model.fold`); None: default values.
        overrides: `key.sub=value` settings applied last.
        output: new TOML file.

    Raises:
        UserError: the folder is not a Llama's, the result is not a valid configuration, overrides
            change the folder's shape, or the file exists or cannot be written.
    """
    shape = model_settings(folder)
    tree = read_tree(base) if base else _start(folder)
    model = tree.setdefault("model", {})
    model.pop("rope_scaling", None)
    if "fold" in shape:  # it determines all layers
        model.pop("route", None)
    model |= shape
    if model["head_dim"] * model["num_heads"] == model["hidden_size"]:
        del model["head_dim"]  # it follows from the other settings
    for override in overrides:
        apply_override(tree, override)
    config = parse_config(copy.deepcopy(tree), str(output))
    check_config(folder, config.model)
    text = f"# [model] is the shape of {folder.resolve().name}.\n\n{tomli_w.dumps(tree)}"
    try:
        with open(output, "x") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(
            f"--write-config: must be a new file, got {output}, which exists (choose another)"
        ) from None


def _start(folder: Path) -> dict[str, Any]:
    """Default sections for a run named after the folder."""
    name = folder.resolve().name or "model"
    return {
        "run": {"dir": f"runs/{name}"},
        "model": {},
        "data": {"path": f"data/{name}", "seq_len": min(max_positions(folder), _SEQ_LEN)},
        **copy.deepcopy(_START),
    }
