"""Tokenizers: loads, copies and hashes a Hugging Face folder or a sentencepiece model.

The ids are those of `tokenizer.json`. Beginning- and end-of-document ids are added here, never by
the tokenizer's template.
"""

import hashlib
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorlm.runtime.errors import UserError

from .chat_templates import copy_chat_templates
from .files import TOKENIZER_FILES, read_files, tokenizer_files, write_files
from .reading import difference, earlier_difference, read_tokenizer


def copy_tokenizer(source: Path, target: Path) -> None:
    """Write a tokenizer and its chat templates to the folder `target`, replacing others."""
    write_files(tokenizer_files(source), target)
    copy_chat_templates(source, target)


def check_tokenizer(
    folder: Path, sha256: str, fix: str = "restore its files, or prepare the data again"
) -> None:
    """Check that `folder` contains the tokenizer with which shards were encoded.

    Args:
        folder: folder of the tokenizer.
        sha256: the shards' `tokenizer_sha256`.
        fix: how to correct it, for the message.

    Raises:
        UserError: it contains another tokenizer or none, or the shards are from an earlier version
            that gave other ids.
    """
    if tokenizer_sha256(folder) == sha256:
        return
    if _sha256(read_files(folder)) != sha256:
        raise UserError(f"{folder}: must be the tokenizer with which the data was encoded ({fix})")
    if (text := earlier_difference(folder, sha256)) is not None:
        raise UserError(
            f"{folder}: the data must have the ids of tokenizer.json, got other ids from an "
            f"earlier version, for example for {text[:40]!r} (encode the data again)"
        )


def tokenizer_sha256(source: Path) -> str:
    """sha256 over the tokenizer's files, names and contents: equal for a folder and its copy."""
    return _sha256(tokenizer_files(source))


def _sha256(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if name in files:
            digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()


def load_tokenizer(folder: str | Path, named: Path | None = None) -> Any:
    """Load a tokenizer for `transformers`: a folder, or a sentencepiece `.model` file.

    Args:
        folder: the folder or file.
        named: the user's name for it, if `folder` is a copy.

    Raises:
        UserError: see `read_tokenizer`.
    """
    return read_tokenizer(Path(folder), named or Path(folder))[1]


def compare_tokenizers(one: Path, other: Path) -> str | None:
    """Describe how two tokenizers differ; None if their files are the same.

    Raises:
        UserError: one of them cannot be loaded.
    """
    if tokenizer_sha256(one) == tokenizer_sha256(other):
        return None
    (first, reader), (second, other_reader) = (read_tokenizer(f, f) for f in (one, other))
    if first.get_vocab() != second.get_vocab():
        return "their vocabularies differ"
    ends = [(t.bos_token_id, t.eos_token_id) for t in (reader, other_reader)]
    if ends[0] != ends[1]:
        return "the ids of BOS and EOS differ"
    text = difference(first, second)
    if text is None:
        return "their files differ, but their ids are the same for all compared texts"
    return f"their ids differ, for example for {text[:40]!r}"


def largest_text_id(tokenizer: Any) -> int:
    """The largest id that an encoded document can contain.

    Special tokens other than its beginning and end, such as padding, do not occur in documents.
    """
    added = tokenizer.added_tokens_decoder
    ids = tokenizer.get_vocab().values()
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return max(*ends, *(i for i in ids if i not in added or not added[i].special))


class DocumentEncoder:
    """Turns texts into documents: BOS, the ids of the text, EOS.

    Text that looks like a special token ("</s>") is encoded as plain text.
    """

    def __init__(self, folder: Path, named: Path | None = None) -> None:
        self._backend, tokenizer = read_tokenizer(folder, named or folder)
        self._backend.encode_special_tokens = True
        self.bos_id: int = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        ids = self._backend.get_vocab().values()  # some may be unused
        self.vocab_size = max(self.bos_id, self.eos_id, *ids) + 1

    def __call__(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """Encode documents; their ids do not depend on their grouping."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        # The standard library's array reads a list three times as fast as numpy.
        lists = (array("I", [self.bos_id, *e.ids, self.eos_id]) for e in encodings)
        return [np.frombuffer(ids, np.uint32) for ids in lists]
