"""Tokenizers: train a sentencepiece model, load any Hugging Face folder, hash it.

Everything is read through `transformers.AutoTokenizer`, so both kinds behave alike. Beginning- and
end-of-document ids are placed here by id, never by the tokenizer's own template.
"""

import hashlib
import io
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from tensorlm.errors import UserError

from .sentencepiece_models import huggingface_files
from .shard_writer import make_folder, write_atomically

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_LINE_BYTES = 4192  # sentencepiece leaves out longer lines, without a word


def has_tokenizer(folder: Path) -> bool:
    """Whether `load_tokenizer` would find one there."""
    return any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json"))


def check_new_tokenizer(output: Path) -> None:
    """Raise UserError unless a tokenizer may be written to `output` in no other one's place."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is no folder (choose another --output)")
    if any((output / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"{output}: holds a tokenizer already (choose another --output)")


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a sentencepiece BPE with byte fallback on `texts`; writes a loadable folder.

    Raises:
        UserError: the texts cannot be read or do not fit `vocab_size`, or the folder cannot be
            written.
    """
    model, unreadable = io.BytesIO(), []

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                for line in text.splitlines():
                    yield from cut_line(line)
        except UserError as error:  # of which sentencepiece makes an error of its own
            unreadable.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
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
        if unreadable:
            raise unreadable[0] from None
        raise UserError(f"--vocab-size {vocab_size}: {_training_problem(str(error))}") from None
    _write_files(_files_of_model(model.getvalue()), folder)


def cut_line(line: str) -> Iterator[str]:
    """Pieces of at most `_LINE_BYTES` that make up a line, each cut behind its last space if any.

    An empty line has none.
    """
    content, start = line.encode(), 0
    while start < len(content):
        stop = start + _LINE_BYTES
        if stop < len(content):
            while content[stop] & 0xC0 == 0x80:  # within a character
                stop -= 1
            stop = content.rfind(b" ", start, stop) + 1 or stop
        yield content[start:stop].decode()
        start = stop


def _training_problem(message: str) -> str:
    """What sentencepiece's message means; it names lines of its own source."""
    if limit := re.search(r"too high.*<= (\d+)", message):
        return f"too large for these texts ({limit[1]} is the largest that works)"
    if limit := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"too small for the characters of these texts ({limit[1]} is the smallest)"
    if "sentences_.empty" in message:
        return "there is no text to train on"
    return f"sentencepiece cannot train on these texts ({message.strip().splitlines()[-1]})"


def tokenizer_files(source: Path) -> dict[str, bytes]:
    """Name and content of the files of a tokenizer: a folder, or a sentencepiece `.model` file.

    A bare sentencepiece model gets the files that let `transformers` give its ids.

    Raises:
        UserError: no tokenizer there, or a model whose ids `transformers` would not give.
    """
    if source.is_file() and source.suffix == ".model":
        files = {"tokenizer.model": source.read_bytes()}
    else:
        found = (source / name for name in TOKENIZER_FILES)
        files = {path.name: path.read_bytes() for path in found if path.is_file()}
    if not {"tokenizer.model", "tokenizer.json"} & set(files):
        raise UserError(f"{source}: no tokenizer.json or tokenizer.model")
    if set(files) == {"tokenizer.model"}:
        try:
            return _files_of_model(files["tokenizer.model"])
        except ValueError as reason:
            raise UserError(
                f"{source}: cannot be used: {reason} (train one with prepare_data.py tokenizer, "
                "or give a Hugging Face folder with a tokenizer.json)"
            ) from None
    return files


def _files_of_model(content: bytes) -> dict[str, bytes]:
    return {"tokenizer.model": content, **huggingface_files(content)}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Write the files of a tokenizer into the folder `target`, in place of another one's."""
    _write_files(tokenizer_files(source), target)


def _write_files(files: dict[str, bytes], folder: Path) -> None:
    make_folder(folder)
    for name in TOKENIZER_FILES:
        path = folder / name
        if name not in files:
            path.unlink(missing_ok=True)
        elif not path.exists() or path.read_bytes() != files[name]:
            write_atomically(path, files[name])


def check_tokenizer(
    folder: Path, sha256: str, fix: str = "restore its files, or prepare the data again"
) -> None:
    """Make sure that `folder` holds the tokenizer that some shards were encoded with.

    Args:
        folder: of a tokenizer.
        sha256: the shards' `tokenizer_sha256`.
        fix: what else to do.

    Raises:
        UserError: there is another one, or none.
    """
    if tokenizer_sha256(folder) != sha256:
        raise UserError(f"{folder}: is not the tokenizer that the data was encoded with ({fix})")


def tokenizer_sha256(source: Path) -> str:
    """sha256 over the tokenizer's files, names and contents: equal for a folder and its copy."""
    digest = hashlib.sha256()
    files = tokenizer_files(source)
    for name in TOKENIZER_FILES:
        if name in files:
            digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()


def load_tokenizer(folder: str | Path, named: Path | None = None) -> Any:
    """Load a Hugging Face tokenizer folder (a bare tokenizer.model needs `copy_tokenizer` first).

    Args:
        folder: what to load.
        named: what the user calls it, where `folder` is a copy.

    Raises:
        UserError: no tokenizer there, a damaged one, or one without beginning- and end-of-text.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    named = named or folder
    if not has_tokenizer(folder):
        raise UserError(f"{named}: no tokenizer.json or tokenizer.model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{named}: the tokenizer cannot be loaded ({reason})") from None
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"{named}: needs bos_token and eos_token in tokenizer_config.json")
    return tokenizer


class DocumentEncoder:
    """Turns texts into documents: BOS, the ids of the text, EOS.

    Text that looks like a special token ("</s>") is encoded as the text that it is.
    """

    def __init__(self, folder: Path, named: Path | None = None) -> None:
        tokenizer = load_tokenizer(folder, named)
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise UserError(f"{named or folder}: has no fast form (save it with a tokenizer.json)")
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
