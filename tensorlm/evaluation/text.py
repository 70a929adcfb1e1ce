"""Held-out text: the spans that perplexity predicts, and the prose that hides needles."""

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
from tensorlm.data.prepare.inputs import Advice, find_files, read_documents
from tensorlm.data.shards import Corpus
from tensorlm.data.tokenizer.tokenizers import check_tokenizer
from tensorlm.runtime.errors import UserError


class Documents(Protocol):
    """Encoded documents, each BOS, text, EOS; `lengths` in tokens. A `Corpus` is one."""

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
    """Text files, encoded when evaluation starts, with the ids that training data would have."""

    def __init__(self, pattern: str, tokenizer: Any, text_field: str = "text") -> None:
        files = find_files([pattern], advice=_ADVICE)
        texts = list(read_documents(files, text_field, advice=_ADVICE))
        if not texts:
            raise UserError(f"eval.text: {pattern} holds no text")
        encoded = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._ids = [np.array([bos, *ids, eos]) for ids in encoded["input_ids"]]
        self.lengths = np.array([len(ids) for ids in self._ids])

    def tokens(self, document: int, start: int, stop: int) -> NDArray[Any]:
        return self._ids[document][start:stop]


def held_out_documents(config: Config, tokenizer: Any, tokenizer_folder: Path) -> Documents:
    """The documents of `eval.text`, or else the data set's valid split.

    Raises:
        UserError: none there, or the split was encoded with another tokenizer.
    """
    if config.eval.text:
        return EncodedTexts(config.eval.text, tokenizer, config.eval.text_field)
    corpus = Corpus(Path(config.data.path) / "valid")
    fix = "restore its files, or give texts with eval.text=GLOB"
    check_tokenizer(tokenizer_folder, corpus.tokenizer_sha256, fix)
    return corpus


# ------------------------------------------------------------------------------------------- spans


@dataclass(frozen=True)
class Spans:
    """Equally long spans of held-out documents, none across two documents.

    tokens: [S, N + 1] int64, one token more than the N that are read, to be predicted last;
    document: [S], where each is from.
    """

    tokens: NDArray[np.int64]
    document: NDArray[np.int64]

    @property
    def length(self) -> int:
        """N."""
        return self.tokens.shape[1] - 1

    @cached_property
    def sha256(self) -> str:
        """Of all tokens, and which document each span is of: equal only where these are."""
        digest = hashlib.sha256(repr(self.tokens.shape).encode())
        _, first = np.unique(self.document, return_inverse=True)
        for values in (self.tokens, first):
            digest.update(np.ascontiguousarray(values, "<i8").tobytes())
        return digest.hexdigest()


def choose_spans(documents: Documents, length: int, max_tokens: int) -> Spans:
    """Spans of `length` tokens, about `max_tokens` in all, from as many documents as possible.

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
            f"eval.lengths: no held-out document has the {length + 1} tokens that length {length} "
            f"needs (the longest has {documents.lengths.max(initial=0)}; choose shorter lengths, "
            "or other texts with eval.text)"
        )
    places = sorted(places)[: max(1, max_tokens // length)]  # first every document's first span
    tokens = [documents.tokens(d, part * length, (part + 1) * length + 1) for part, d in places]
    return Spans(np.stack(tokens).astype(np.int64), np.array([document for _, document in places]))


# ------------------------------------------------------------------------------------------- prose

_MOST_WORDS_PER_TOKEN = 16  # of any tokenizer that could be meant for text


class Prose:
    """Running text in which needles hide: words with one space between, cut where wanted."""

    def __init__(self, text: str, num_words: int) -> None:
        """Keep `num_words` words of `text`, repeated where it has fewer."""
        words = text.split()
        if not words:
            raise UserError("eval.text: no words to hide needles in (give texts with eval.text)")
        words = (words * -(-num_words // len(words)))[:num_words]
        self.num_words = num_words
        self.text = " ".join(words)
        self._ends = np.cumsum([len(word) + 1 for word in words]) - 1  # of each word, in characters
        starts = [0, *(match.end() for match in re.finditer(r"[.!?][\"')\]]* ", self.text))]
        self._sentences = np.array(starts)

    def cut(self, num_words: int) -> tuple[str, NDArray[np.int64]]:
        """The first words, and where in that text sentences start (and where it ends)."""
        end = int(self._ends[min(num_words, len(self._ends)) - 1])
        starts = self._sentences[: np.searchsorted(self._sentences, end)]
        return self.text[:end], np.append(starts, end)


def insert(text: str, places: list[int], pieces: list[str]) -> str:
    """Put each piece where its character offset says, with a space around it.

    RULER joins the parts in the same way: also those that are empty, at both ends.
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
    """Prose of at least `num_tokens` tokens from the first held-out documents.

    A word is a token or more, except where tokens span words: then more words are taken.
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
