"""Tokenizers: train a sentencepiece model, load any Hugging Face folder, hash it.

Everything is read through `transformers.AutoTokenizer`, so both kinds behave alike. Beginning- and
end-of-document ids are placed here by id, never by the tokenizer's own template.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

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
    copy_tokenizer(folder, folder)


def tokenizer_files(source: Path) -> dict[str, bytes]:
    """Name and content of the files of a tokenizer: a folder, or a sentencepiece `.model` file.

    A bare sentencepiece model gets a configuration that says what it is: without one, AutoTokenizer
    reads it wrongly.

    Raises:
        UserError: no tokenizer there.
    """
    if source.is_file() and source.suffix == ".model":
        files = {"tokenizer.model": source.read_bytes()}
    else:
        found = (source / name for name in TOKENIZER_FILES)
        files = {path.name: path.read_bytes() for path in found if path.is_file()}
    if not {"tokenizer.model", "tokenizer.json"} & set(files):
        raise UserError(f"{source}: no tokenizer.json or tokenizer.model")
    if "tokenizer.model" in files and "tokenizer_config.json" not in files:
        files["tokenizer_config.json"] = json.dumps(_SENTENCEPIECE_CONFIG, indent=1).encode()
    return files


def copy_tokenizer(source: Path, target: Path) -> None:
    """Write the files of a tokenizer into the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(source).items():
        if not (target / name).exists() or (target / name).read_bytes() != content:
            (target / name).write_bytes(content)


def tokenizer_sha256(source: Path) -> str:
    """sha256 over the tokenizer's files, names and contents: equal for a folder and its copy."""
    digest = hashlib.sha256()
    files = tokenizer_files(source)
    for name in TOKENIZER_FILES:
        if name in files:
            digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()


def load_tokenizer(folder: str | Path) -> Any:
    """Load a Hugging Face tokenizer folder (a bare tokenizer.model needs `copy_tokenizer` first).

    Raises:
        UserError: no tokenizer there, a damaged one, or one without beginning- and end-of-text.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        raise UserError(f"{folder}: no tokenizer.json or tokenizer.model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({reason})") from None
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: needs bos_token and eos_token in tokenizer_config.json")
    return tokenizer


class DocumentEncoder:
    """Turns texts into documents: BOS, the ids of the text, EOS.

    Text that looks like a special token ("</s>") is encoded as the text that it is.
    """

    def __init__(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise UserError(f"{folder}: has no fast form (save it with a tokenizer.json)")
        self.vocab_size = len(tokenizer)
        self.bos_id: int = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self._backend = tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()

    def __call__(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """Encode documents; the same ids for any grouping of them."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        # An array of the standard library takes a list three times as fast as one of numpy.
        lists = (array("I", [self.bos_id, *e.ids, self.eos_id]) for e in encodings)
        return [np.frombuffer(ids, np.uint32) for ids in lists]
