"""Training a sentencepiece tokenizer in a folder that `transformers` can read."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from tensorlm.runtime.disk import sync_folder
from tensorlm.runtime.errors import UserError

from ..prepare.shard_writer import make_folder, write_atomically
from .files import TOKENIZER_FILES, UNFINISHED, write_files
from .sentencepiece_models import huggingface_files

_LINE_BYTES = 4192  # sentencepiece silently skips longer lines


def check_new_tokenizer(output: Path) -> None:
    """Raise UserError if writing a tokenizer to `output` would replace another one.

    Leftovers of a killed call of `train_tokenizer` may be replaced.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: must be a folder (choose another --output)")
    if (output / UNFINISHED).exists():
        return
    if any((output / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"{output}: already contains a tokenizer (choose another --output)")


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a sentencepiece BPE with byte fallback on `texts`, and write it to `folder`.

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
        except UserError as error:  # sentencepiece would raise its own error instead
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
        raise UserError(_training_problem(str(error), vocab_size)) from None
    content = model.getvalue()
    _write_new({"tokenizer.model": content, **huggingface_files(content)}, folder)


def _write_new(files: dict[str, bytes], folder: Path) -> None:
    """Write all files; a marker file exists while some are missing."""
    make_folder(folder)
    mark = folder / UNFINISHED
    write_atomically(mark, b"")
    sync_folder(folder)
    write_files(files, folder)
    sync_folder(folder)
    mark.unlink()


def cut_line(line: str) -> Iterator[str]:
    """Cut a line into pieces of at most `_LINE_BYTES`, after the last space of each if possible.

    An empty line has no pieces.
    """
    content, start = line.encode(), 0
    while start < len(content):
        stop = start + _LINE_BYTES
        if stop < len(content):
            while content[stop] & 0xC0 == 0x80:  # inside a character
                stop -= 1
            stop = content.rfind(b" ", start, stop) + 1 or stop
        yield content[start:stop].decode()
        start = stop


def _training_problem(message: str, vocab_size: int) -> str:
    """Explain sentencepiece's message, which quotes its source code."""
    if limit := re.search(r"too high.*<= (\d+)", message):
        return f"--vocab-size: must be at most {limit[1]} for these texts, got {vocab_size}"
    if limit := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        rule = f"must be at least {limit[1]} for the characters of these texts"
        return f"--vocab-size: {rule}, got {vocab_size}"
    if "sentences_.empty" in message:
        return "--input: must contain text to train on, got none"
    return f"--input: sentencepiece cannot train on it ({message.strip().splitlines()[-1]})"
