"""The files of a tokenizer, in a portable form with the same ids for every reader.

`transformers` rebuilds some classes (`GPT2Tokenizer`, `LlamaTokenizer`, ...): it takes the
vocabulary from `tokenizer.json` and ignores its rules. The portable form names the class that reads
the file unchanged. So the data set, its copy in `DATA/tokenizer` and an exported folder all have
the ids of `tokenizer.json`, or of a single sentencepiece model.
"""

import inspect
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from tensorlm.runtime.errors import UserError, first_line

from ..prepare.shard_writer import make_folder, write_atomically
from .sentencepiece_models import huggingface_files

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
UNFINISHED = "tokenizer.unfinished"  # exists while some of the files are missing
_ADDED_TOKENS = "added_tokens.json"  # in old folders without a tokenizer.json
_CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json unchanged, in transformers 4 and 5
_NAMED = ("bos_token", "eos_token")
_REBUILDING = ("add_prefix_space", "legacy", "sp_model_kwargs", "from_slow")
_HAS_DROPOUT = re.compile(rb'"dropout"\s*:\s*[0-9.]')


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder contains a tokenizer."""
    return any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json"))


def read_files(source: Path) -> dict[str, bytes]:
    """Name and content of a tokenizer's files, unchanged, from a folder or a `.model` file.

    Raises:
        UserError: there is no tokenizer.
    """
    if source.is_file() and source.suffix == ".model":
        return {"tokenizer.model": source.read_bytes()}
    if (source / UNFINISHED).exists():
        raise UserError(
            f"{source}: must contain a complete tokenizer, got one whose training was interrupted "
            f"(repeat prepare_data.py tokenizer with --output {source})"
        )
    if not has_tokenizer(source):
        raise UserError(f"{source}: must contain tokenizer.json or tokenizer.model")
    found = (source / name for name in (*TOKENIZER_FILES, _ADDED_TOKENS))
    return {path.name: path.read_bytes() for path in found if path.is_file()}


def tokenizer_files(source: Path) -> dict[str, bytes]:
    """Name and content of a tokenizer's files in the portable form; portable files do not change.

    Args:
        source: a folder, or a sentencepiece `.model` file.

    Raises:
        UserError: there is no tokenizer, it is damaged, or `transformers` would give other ids than
            its sentencepiece model.
    """
    files = read_files(source)
    added = files.pop(_ADDED_TOKENS, b"{}")
    try:
        if "tokenizer.json" not in files:
            files |= _files_of_model(files, added)
        files["tokenizer.json"] = _without_dropout(files["tokenizer.json"])
        files["tokenizer_config.json"] = _portable_config(files.get("tokenizer_config.json", b""))
    except _RefusedError as reason:
        raise UserError(
            f"{source}: cannot be used: {reason} (train a tokenizer with prepare_data.py "
            "tokenizer, or pass a Hugging Face folder with a tokenizer.json)"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{source}: the tokenizer cannot be loaded ({first_line(error)})") from None
    return files


def write_files(files: dict[str, bytes], folder: Path) -> None:
    """Write these files of a tokenizer to `folder`, and remove its other tokenizer files.

    Raises:
        UserError: they cannot be written.
    """
    make_folder(folder)
    for name in TOKENIZER_FILES:
        path = folder / name
        if name not in files:
            path.unlink(missing_ok=True)
        elif not path.exists() or path.read_bytes() != files[name]:
            write_atomically(path, files[name])


class _RefusedError(Exception):
    """The reason why a sentencepiece model cannot be used."""


def _files_of_model(files: dict[str, bytes], added: bytes) -> dict[str, bytes]:
    """The files that a folder without a tokenizer.json lacks; its config's settings are kept."""
    try:
        made = huggingface_files(files["tokenizer.model"])
    except ValueError as reason:
        raise _RefusedError(str(reason)) from None
    if "tokenizer_config.json" not in files and added == b"{}":
        return made
    form = json.loads(made["tokenizer.json"])
    config = dict(json.loads(files.get("tokenizer_config.json", b"{}")))
    _add_tokens(form, config, json.loads(added))
    config = {key: value for key, value in config.items() if key not in _REBUILDING}
    config = json.loads(made["tokenizer_config.json"]) | config
    return {
        "tokenizer.json": json.dumps(form, ensure_ascii=False).encode(),
        "tokenizer_config.json": _dump(config),
    }


def _add_tokens(form: dict[str, Any], config: dict[str, Any], legacy: dict[str, int]) -> None:
    """Append the tokens that a folder adds to its sentencepiece model after the model's pieces."""
    vocab: dict[str, int] = form["model"]["vocab"]
    tokens = {int(index): token for index, token in config.get("added_tokens_decoder", {}).items()}
    for content, index in legacy.items():
        tokens.setdefault(index, {"content": content, "special": True})
    pieces = {index: piece for piece, index in vocab.items()}
    end = len(vocab)
    for index, token in sorted(tokens.items()):
        if pieces.get(index) == token["content"]:
            continue
        if index != end or not token.get("special"):
            raise _RefusedError(
                f"the added token {token['content']!r} must be a special token with the next id "
                f"after the model's pieces, {end}, got id {index}"
            )
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        form["added_tokens"].append(
            {"id": index, "content": token["content"]}
            | {flag: bool(token.get(flag, False)) for flag in flags}
            | {"special": True}
        )
        end += 1


@lru_cache(maxsize=4)
def _without_dropout(content: bytes) -> bytes:
    """A `tokenizer.json` without dropout, so that merges are deterministic."""
    if not _HAS_DROPOUT.search(content):
        return content
    form = json.loads(content)
    if form["model"].get("dropout") is None:  # the match may be the name of a piece
        return content
    form["model"]["dropout"] = None
    return json.dumps(form, ensure_ascii=False).encode()


@lru_cache(maxsize=4)
def _portable_config(content: bytes) -> bytes:
    """A `tokenizer_config.json` whose class reads `tokenizer.json` unchanged."""
    config = dict(json.loads(content)) if content else {}
    name = config.get("tokenizer_class")
    if name == _CLASS and "auto_map" not in config:
        return content
    config.pop("auto_map", None)  # names code that is not copied
    defaults = _default_tokens(name) if isinstance(name, str) else {}
    return _dump({"tokenizer_class": _CLASS} | defaults | config | {"tokenizer_class": _CLASS})


def _default_tokens(class_name: str) -> dict[str, str]:
    """A `transformers` class's default tokens for the beginning and end of a text."""
    import transformers

    found = getattr(transformers, class_name, None)
    if not inspect.isclass(found):
        return {}
    parameters = inspect.signature(found.__init__).parameters
    defaults = {name: parameters[name].default for name in _NAMED if name in parameters}
    return {name: token for name, token in defaults.items() if isinstance(token, str)}


def _dump(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode()
