"""Tokenizers: train a sentencepiece model, load any Hugging Face folder, hash it.

Everything is read through `transformers.AutoTokenizer`, so both kinds behave alike. Beginning- and
end-of-document ids are placed here by id, never by the tokenizer's own template.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from tensorlm.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)

_SENTENCEPIECE_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
}


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a sentencepiece BPE with byte fallback on `texts`; writes a loadable folder.

    Raises:
        UserError: the texts are too few for `vocab_size`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"tokenizer: training with vocab_size {vocab_size}: {reason}") from None
    (folder / "tokenizer.vocab").unlink(missing_ok=True)
    write_sentencepiece_config(folder)


def write_sentencepiece_config(folder: Path) -> None:
    """Say what a bare `tokenizer.model` is: without this, AutoTokenizer reads it wrongly."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        path.write_text(json.dumps(_SENTENCEPIECE_CONFIG, indent=1))


def load_tokenizer(folder: str | Path) -> Any:
    """Load a Hugging Face tokenizer folder (or a folder with a sentencepiece tokenizer.model).

    Raises:
        UserError: no tokenizer there, or one without beginning- and end-of-text tokens.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        raise UserError(f"{folder}: no tokenizer.json or tokenizer.model")
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: needs bos_token and eos_token in tokenizer_config.json")
    return tokenizer


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files; a bare tokenizer.model gets its configuration beside it."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).exists() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)
    if (target / "tokenizer.model").exists():
        write_sentencepiece_config(target)


def tokenizer_sha256(folder: Path) -> str:
    """sha256 over the tokenizer's files: names and contents."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return digest.hexdigest()
