"""Importing a Hugging Face Llama folder as checkpoint step 0 of a run, a few tensors at a time.

Names, shapes and dtypes of all weights are checked in the files' headers before any weight is read.
"""

import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tensorlm.checkpoint import list_steps
from tensorlm.checkpoint.publish import was_imported, write_weights
from tensorlm.config import Config
from tensorlm.data.tokenizer.chat_templates import copy_chat_templates
from tensorlm.data.tokenizer.files import TOKENIZER_FILES
from tensorlm.model import Llama
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.lock import lock_run
from tensorlm.runtime.progress import byte_bar

from .export_folder import hf_name
from .llama_config import check_config
from .weight_files import check_finite, weight_files

_DTYPES = ("BF16", "F16", "F32")
_ROWS = 1 << 13  # rows of the embedding compared at one time
# Redundant tensors that old folders contain besides the weights.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_CARRIED = ("config.json", "generation_config.json", "added_tokens.json", *TOKENIZER_FILES)


def import_weights(folder: Path, config: Config) -> Path:
    """Import a Llama folder, or an exported one, as checkpoint step 0 of `config.run.dir`.

    Adam's moments start at zero. Hop biases start at `hop_bias_init` if the folder has none. The
    folder's tokenizer and settings are copied into the run, for a later export.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the folder's shape differs from the configured one (a line per setting); its
            architecture is not supported; weights are missing, unexpected, of another shape, not
            finite or not tied as declared; or the run already has checkpoints or is in use.
    """
    run_dir = Path(config.run.dir)
    _check_new(run_dir)
    check_config(folder, config.model)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in Llama(config.model).named_parameters()}
    files = _check_weights(folder, shapes)
    if config.model.tie_embeddings:
        _check_tied(folder, files)

    def parameters() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            if hf_name(name) not in files:
                yield name, torch.full(shape, config.model.hop_bias_init)
                continue
            with safe_open(files[hf_name(name)], "pt") as file:
                weight = file.get_tensor(hf_name(name))
            check_finite(folder, hf_name(name), weight)
            yield name, weight.float()

    info = {
        "state": {"step": 0, "rows": 0, "tokens": 0},
        "adam_step": 0,
        "adam_state": False,
        "config": config.model_dump(mode="json", exclude_none=True),
        "data_fingerprint": "",
        "imported_from": folder.resolve().name,
    }
    name = folder.resolve().name or "model"  # "": the root of a file system
    total = sum(4 * math.prod(shape) for shape in shapes.values())
    with _locked(run_dir), byte_bar(total, f"import {name}") as moved:
        _check_new(run_dir)
        try:
            _carry(folder, run_dir / "imported" / name)
            return write_weights(run_dir, parameters(), info, moved)
        except BaseException:
            shutil.rmtree(run_dir / "imported", ignore_errors=True)
            raise


def imported_folder(run_dir: Path) -> Path | None:
    """The run's copy of the imported folder's tokenizer and settings, or None."""
    folders = sorted((run_dir / "imported").glob("*/")) if was_imported(run_dir) else []
    return next(iter(folders), None)


def _check_new(run_dir: Path) -> None:
    if list_steps(run_dir):
        raise UserError(f"{run_dir}: already has checkpoints (choose a new run.dir)")


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Prevent others from importing into the run, or training it, in the body."""
    descriptor = lock_run(run_dir)
    try:
        yield
    finally:
        os.close(descriptor)


def _carry(folder: Path, target: Path) -> None:
    shutil.rmtree(target.parent, ignore_errors=True)  # of an import that failed
    target.mkdir(parents=True)
    for name in _CARRIED:
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)
    copy_chat_templates(folder, target)


# ---------------------------------------------------------------------------------------- weights


def _check_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Path]:
    """Check the headers of all files; returns the file of each weight.

    Raises:
        UserError: a line for each file that cannot be read, for missing and for unexpected weights
            (naming the first), and for each weight of another shape or dtype.
    """
    found: dict[str, tuple[Path, list[int], str]] = {}
    problems = []
    for path in weight_files(folder):
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
    for what, names in (("missing", missing), ("not part of a Llama", strange)):
        if names:
            problems.append(f"{folder}: {len(names)} weights are {what}, first {names[0]}")
    for name, (path, shape, dtype) in found.items():
        if shape != expected.get(name, shape):
            problems.append(f"{path}: {name} must have shape {expected[name]}, got {shape}")
        if dtype not in _DTYPES:
            problems.append(f"{path}: {name} must be {', '.join(_DTYPES)}, got {dtype}")
    if problems:
        raise UserError(*problems)
    return {name: path for name, (path, _, _) in found.items()}


def _check_tied(folder: Path, files: dict[str, Path]) -> None:
    """Check that the output head of a folder with tied embeddings, if stored, is the embedding.

    Raises:
        UserError: it is not, and would be lost.
    """
    head_name, embedding_name = hf_name("lm_head.weight"), hf_name("embed_tokens.weight")
    if head_name not in files:
        return
    with (
        safe_open(files[head_name], "pt") as head_file,
        safe_open(files[embedding_name], "pt") as embedding_file,
    ):
        head, embedding = head_file.get_slice(head_name), embedding_file.get_slice(embedding_name)
        shape = embedding.get_shape()
        if head.get_shape() != shape or not all(
            torch.equal(head[row : row + _ROWS].float(), embedding[row : row + _ROWS].float())
            for row in range(0, shape[0], _ROWS)
        ):
            raise UserError(
                f"{folder}: {head_name} must be the embedding, since tie_word_embeddings is true "
                "(set that and model.tie_embeddings to false)"
            )
