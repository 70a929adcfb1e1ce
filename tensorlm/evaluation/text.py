"""Held-out text: spans for perplexity, and prose for needles."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tensorlm.config import Config
from tensorlm.data.prepare.files import find_files
from tensorlm.data.prepare.input_errors import Advice
from tensorlm.data.prepare.inputs import read_documents
from tensorlm.data.shards import Corpus
from tensorlm.data.tokenizer.tokenizers import check_tokenizer
from tensorlm.runtime.errors import UserError


class Documents(Protocol):
    """Encoded documents, each BOS, text, EOS; `lengths` in tokens. `Corpus` implements it."""

    lengths: NDArray[np.int64]

    def tokens(self, document: int, start: int, stop: int) -> NDArray[Any]:
        """Tokens [start, stop) of one document, clipped to its length."""
        ...


_ADVICE = Advice(
    field="choose eval.text_field",
    skip="choose other files with eval.text",
    larger="choose other files with eval.text",
)


class EncodedTexts:
    """Text files, encoded at the start of an evaluation, with the same ids as training data."""

    def __init__(self, pattern: str, tokenizer: Any, text_field: str = "text") -> None:
        files = find_files([pattern], advice=_ADVICE)
        texts = list(read_documents(files, text_field, advice=_ADVICE))
        if not texts:
            raise UserError(f"eval.text: must contain text, got none in {pattern}")
        encoded = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._ids = [np.array([bos, *ids, eos]) for ids in encoded["input_ids"]]
        self.lengths = np.array([len(ids) for ids in self._ids])

    def tokens(self, document: int, start: int, stop: int) -> NDArray[Any]:
        return self._ids[document][start:stop]


def held_out_documents(config: Config, tokenizer: Any, tokenizer_folder: Path) -> Documents:
    """The documents of `eval.text`, or else of the data set's valid split.

    Raises:
        UserError: there are no documents, or the split was encoded with another tokenizer.
    """
    if config.eval.text:
        return EncodedTexts(config.eval.text, tokenizer, config.eval.text_field)
    corpus = Corpus(Path(config.data.path) / "valid")
    fix = "restore its files, or set eval.text=GLOB"
    check_tokenizer(tokenizer_folder, corpus.tokenizer_sha256, fix)
    return corpus


# ------------------------------------------------------------------------------------------- spans


@dataclass(frozen=True)
class Spans:
    """Equally long spans of held-out documents; a span never crosses documents.

    tokens: [S, N + 1] int64: N input tokens and one more, which is only predicted.
    document: [S], the document of each span.
    """

    tokens: NDArray[np.int64]
    document: NDArray[np.int64]

    @property
    def length(self) -> int:
        """N."""
        return self.tokens.shape[1] - 1

    @cached_property
    def sha256(self) -> str:
        """Hash of all tokens and of the division into documents."""
        digest = hashlib.sha256(repr(self.tokens.shape).encode())
        _, first = np.unique(self.document, return_inverse=True)
        for values in (self.tokens, first):
            digest.update(np.ascontiguousarray(values, "<i8").tobytes())
        return digest.hexdigest()


def choose_spans(documents: Documents, length: int, max_tokens: int) -> Spans:
    """Choose spans of `length` tokens, about `max_tokens` in total, from many documents.

    Raises:
        UserError: no document is long enough.
    """
    per_document = (documents.lengths - 1) // length
    places = [
        (part, int(document))
        for document in np.flatnonzero(per_document)
        for part in range(per_document[document])
    ]
    if not places:
        raise UserError(
            f"eval.lengths: a held-out document must have {length + 1} tokens for length {length}, "
            f"got at most {documents.lengths.max(initial=0)} (choose shorter lengths, or longer "
            "texts with eval.text)"
        )
    places = sorted(places)[: max(1, max_tokens // length)]  # each document's first span first
    tokens = [documents.tokens(d, part * length, (part + 1) * length + 1) for part, d in places]
    return Spans(np.stack(tokens).astype(np.int64), np.array([document for _, document in places]))


# ------------------------------------------------------------------------------------------- prose

_MOST_WORDS_PER_TOKEN = 16  # upper limit for any reasonable tokenizer


class Prose:
    """Running text for hiding needles: words separated by single spaces, cut at any word."""

    def __init__(self, text: str, num_words: int) -> None:
        """Keep `num_words` words of `text`, repeated if it has fewer."""
        words = text.split()
        if not words:
            raise UserError("eval.text: must contain words to hide needles in, got none")
        words = (words * -(-num_words // len(words)))[:num_words]
        self.num_words = num_words
        self.text = " ".join(words)
        self._ends = np.cumsum([len(word) + 1 for word in words]) - 1  # character offsets
        starts = [0, *(match.end() for match in re.finditer(r"[.!?][\"')\]]* ", self.text))]
        self._sentences = np.array(starts)

    def cut(self, num_words: int) -> tuple[str, NDArray[np.int64]]:
        """The first `num_words` words, and the offsets of sentence starts and of the end."""
        end = int(self._ends[min(num_words, len(self._ends)) - 1])
        starts = self._sentences[: np.searchsorted(self._sentences, end)]
        return self.text[:end], np.append(starts, end)


def insert(text: str, places: list[int], pieces: list[str]) -> str:
    """Insert each piece at its character offset, with spaces around it.

    Like RULER, this also joins empty parts at both ends.
    """
    parts, last = [], 0
    for place, piece in sorted(zip(places, pieces, strict=True)):
        parts += [text[last:place].rstrip(" "), piece]
        last = place
    parts.append(text[last:])
    return " ".join(parts)


def make_prose(
    documents: Documents, tokenizer: Any, num_tokens: int, encode: Callable[[str], list[int]]
) -> Prose:
    """Make prose of at least `num_tokens` tokens from the first held-out documents.

    A word usually has one token or more. If tokens span words, more words are taken.
    """
    for words_per_token in (1, 2, 4, 8, _MOST_WORDS_PER_TOKEN):
        num_words = words_per_token * num_tokens
        prose = Prose(" ".join(_texts(documents, tokenizer, num_words)), num_words)
        if len(encode(prose.text)) >= num_tokens:
            break
    return prose


def _texts(documents: Documents, tokenizer: Any, num_words: int) -> Iterator[str]:
    found = 0
    for document, length in enumerate(documents.lengths):
        ids = documents.tokens(document, 0, int(length))
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        found += len(text.split())
        yield text
        if found >= num_words:
            return
