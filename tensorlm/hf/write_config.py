"""A run's configuration from a Hugging Face folder, so that nobody copies its shape by hand."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from tensorlm.config import apply_override, parse_config, read_tree
from tensorlm.runtime.errors import UserError

from .llama_config import check_config, max_positions, model_settings

_SEQ_LEN = 4096  # at most, where no configuration says another
_START: dict[str, Any] = {
    "optim": {"lr": 3e-5, "warmup_steps": 100},
    "train": {"steps": 1000, "rows_per_step": 16},
}


def write_config(folder: Path, base: Path | None, overrides: Sequence[str], output: Path) -> None:
    """Write a configuration whose `[model]` is that of `folder`.

    Args:
        folder: with a Llama's config.json.
        base: configuration that the other sections come from, and what the folder does not
            determine (such as `model.fold`); None: values to start from.
        overrides: `key.sub=value` settings on top.
        output: new TOML file.

    Raises:
        UserError: the folder is not a Llama's, the whole is not a configuration, overrides change
            the folder's shape, or the file exists or cannot be written.
    """
    shape = model_settings(folder)
    tree = read_tree(base) if base else _start(folder)
    model = tree.setdefault("model", {})
    model.pop("rope_scaling", None)
    if "fold" in shape:  # it determines all layers
        model.pop("route", None)
    model |= shape
    if model["head_dim"] * model["num_heads"] == model["hidden_size"]:
        del model["head_dim"]  # it follows
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
            f"--write-config: {output} must be a new file, got one that exists (choose another)"
        ) from None


def _start(folder: Path) -> dict[str, Any]:
    """Sections for a run of its own, named after the folder."""
    name = folder.resolve().name or "model"
    return {
        "run": {"dir": f"runs/{name}"},
        "model": {},
        "data": {"path": f"data/{name}", "seq_len": min(max_positions(folder), _SEQ_LEN)},
        **copy.deepcopy(_START),
    }
