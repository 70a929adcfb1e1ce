"""Serving packed rows: the order of rows is a pure function of (seed, global row index).

The whole state of the loader is the number of rows consumed. Number of ranks and micro-batch do not
change the order. They only decide which rank reads which row, or which slice of it.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tensorlm.batch import IGNORED, Batch
from tensorlm.config import Config
from tensorlm.runtime.errors import UserError

from .epochs import SourceRows
from .mixing import Mix
from .packing import RowPlan
from .shards import Corpus
from .tokenizer.tokenizers import check_tokenizer, tokenizer_sha256

_WORD = (1 << 64) - 1
# Tokens, labels and document starts.
_Row = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]


class RowPhase(NamedTuple):
    """A phase: `num_rows` rows of one length; None for the last phase, which has no fixed end."""

    seq_len: int
    num_rows: int | None


class PackedRows:
    """The rows of a run in order: sources mixed by weight, phase after phase.

    Args:
        corpora: the sources.
        weights: their shares of the rows, in any unit.
        phases: the phases; the last one has no fixed end.
        packing: "best_fit" or "concat".
        seed: seed of the run.
        num_rows: number of rows that the run will use.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        weights: Sequence[float],
        phases: Sequence[RowPhase],
        packing: str,
        seed: int,
        num_rows: int,
    ) -> None:
        self.corpora, self.phases, self.num_rows = corpora, phases, num_rows
        self.mix = Mix(weights, num_rows)
        sizes = [phase.num_rows or 0 for phase in phases]
        self._phase_first = list(itertools.accumulate(sizes[:-1], initial=0))
        self.sources = []
        for source, corpus in enumerate(corpora):
            counts = [self.mix.count(source, first) for first in self._phase_first]
            own = [b - a for a, b in itertools.pairwise(counts)]
            wanted = [(s.seq_len, n) for s, n in zip(phases, [*own, None], strict=True)]
            self.sources.append(SourceRows(corpus.lengths, wanted, packing, seed))
        identity = [
            [corpus.fingerprint for corpus in corpora],
            self.mix.shares,
            [(phase.seq_len, phase.num_rows) for phase in phases],
            packing,
            seed,
        ]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        # Compute every plan that the run will need now: a plan takes 4 s for a million documents,
        # too long for a training step in which an epoch ends.
        self.epochs(num_rows)

    def seq_len(self, index: int) -> int:
        """Tokens in global row `index`."""
        return self.phases[self._phase(index)].seq_len

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer, which is the same for all sources."""
        return self.corpora[0].tokenizer_sha256

    def describe(self) -> list[str]:
        """One line for each source: its size, and how much of it the run will use."""
        total = self.mix.period
        return [
            f"data: {corpus.name}: {corpus.num_tokens:,} tokens, {share / total:.1%} of the rows, "
            f"{epochs:.2f} epochs; rows are {rows.last_plan.fill:.2%} full"
            for corpus, share, rows, epochs in zip(
                self.corpora, self.mix.shares, self.sources, self.epochs(self.num_rows), strict=True
            )
        ]

    def epochs(self, num_rows: int) -> list[float]:
        """Number of epochs of each source in the first `num_rows` rows."""
        phase = self._phase(num_rows)
        return [
            rows.epochs(phase, self._row_of_source(source, num_rows, phase))
            for source, rows in enumerate(self.sources)
        ]

    def num_tokens(self, num_rows: int) -> int:
        """Number of tokens in the first `num_rows` rows, without padding."""
        phase = self._phase(num_rows)
        return sum(
            rows.num_tokens(phase, self._row_of_source(source, num_rows, phase))
            for source, rows in enumerate(self.sources)
        )

    def batch(self, indices: range, tokens: slice = slice(None), *, pin: bool = False) -> Batch:
        """The slice `tokens` of the global rows `indices`, which are of one phase.

        Only this slice is read.
        """
        first, stop, _ = tokens.indices(self.seq_len(indices[0]))
        shape = (len(indices), stop - first)
        (ids, a), (labels, b), (doc_start, c) = (
            _new(shape, dtype, pin) for dtype in (torch.int64, torch.int64, torch.int32)
        )
        digest, row_tokens = 0, []
        for index, row in zip(indices, zip(a, b, c, strict=True), strict=True):
            row_tokens.append(self._fill(index, first, row))
            digest += _digest(index, first, row[0], row[2])
        return Batch(ids, labels, doc_start, tuple(row_tokens), first, digest & _WORD)

    def micro_batches(
        self,
        first_row: int,
        num_rows: int,
        micro_batch: int,
        tokens: slice = slice(None),
        *,
        pin: bool = False,
    ) -> list[Batch]:
        """Rows first_row ... first_row + num_rows, `micro_batch` rows at a time."""
        firsts = range(first_row, first_row + num_rows, micro_batch)
        return [self.batch(range(at, at + micro_batch), tokens, pin=pin) for at in firsts]

    def documents(self, indices: range) -> list[str]:
        """Documents in the rows `indices`: `number`, or `source:number` with several sources."""
        found: set[tuple[int, int]] = set()
        for index in indices:
            source, plan, row = self._locate(index)
            pieces = slice(plan.row_first[row], plan.row_first[row + 1])
            found.update((source, document) for document in plan.pieces.document[pieces].tolist())
        names = [f"{corpus.name}:" if len(self.corpora) > 1 else "" for corpus in self.corpora]
        return [f"{names[source]}{document}" for source, document in sorted(found)]

    def _phase(self, index: int) -> int:
        return bisect.bisect_right(self._phase_first, index) - 1

    def _row_of_source(self, source: int, index: int, phase: int) -> int:
        """Number of rows of a source in this phase before global row `index`."""
        count = self.mix.count
        return count(source, index) - count(source, self._phase_first[phase])

    def _locate(self, index: int) -> tuple[int, RowPlan, int]:
        phase, source = self._phase(index), self.mix.source(index)
        row = self._row_of_source(source, index, phase)
        return source, *self.sources[source].locate(phase, row)

    def _fill(self, index: int, first: int, target: _Row) -> int:
        """Write tokens first ... first + len(target[0]) of a row; returns where padding begins.

        In the padding, tokens are 0, labels are IGNORED, and each token is its own document.
        """
        tokens, labels, doc_start = target
        source, plan, row = self._locate(index)
        corpus, stop = self.corpora[source], first + len(tokens)
        pieces = plan.pieces[plan.row_first[row] : plan.row_first[row + 1]]
        end = 0
        if len(tokens) < plan.seq_len:  # only the pieces that reach into the slice
            ends = np.cumsum(pieces.length)
            low, high = np.searchsorted(ends, [first, stop - 1], side="right")
            end = int(ends[low - 1]) if low else 0
            pieces = pieces[low : high + 1]
        document = pieces.document
        of_document = (corpus.shard_of(document), corpus.begins[document], corpus.lengths[document])
        columns = (pieces.start, pieces.length, *of_document)
        # Rows have few pieces: plain integers are faster here than small arrays.
        for start, length, shard, at, whole in zip(*(c.tolist() for c in columns), strict=True):
            begin, end = end, end + length
            a, b = max(begin - first, 0), min(end, stop) - first
            start += a + first - begin
            # Read one more token if the document continues: it is the last label.
            count = min(b - a + 1, whole - start)
            text = corpus.shards[shard].tokens[at + start : at + start + count]
            tokens[a:b] = text[: b - a]
            labels[a : a + count - 1] = text[1:]
            labels[a + count - 1 : b] = IGNORED
            doc_start[a:b] = begin
        padding = min(max(end - first, 0), len(tokens))
        tokens[padding:], labels[padding:] = 0, IGNORED
        doc_start[padding:] = np.arange(first + padding, stop)
        return padding


def _new(shape: tuple[int, int], dtype: torch.dtype, pin: bool) -> tuple[Tensor, NDArray[Any]]:
    """A tensor to fill, and its memory as an array; NumPy allocates unpinned memory faster."""
    if pin:
        tensor = torch.empty(shape, dtype=dtype, pin_memory=True)
        return tensor, tensor.numpy()
    array = np.empty(shape, np.int32 if dtype == torch.int32 else np.int64)
    return torch.from_numpy(array), array


def _digest(index: int, first: int, tokens: NDArray[np.int64], doc_start: NDArray[np.int32]) -> int:
    """Sum over tokens of (token, document start) times words given by position and row."""
    words = _words(first + len(tokens))[:, first:]
    place = int(words[0] @ tokens.view(np.uint64)) + int(words[1] @ doc_start.astype(np.uint64))
    return place * (_mixed(index) | 1) & _WORD


def _mixed(number: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014): neighboring numbers give unrelated words."""
    word = (number + 1) * 0x9E3779B97F4A7C15 & _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


@cache
def _words(seq_len: int) -> NDArray[np.uint64]:
    """[2, seq_len] odd random words, which never change."""
    return np.stack([np.random.Philox(key).random_raw(seq_len) | 1 for key in (1, 2)])


def open_rows(config: Config, split: str) -> PackedRows:
    """Open a split of every configured source.

    Raises:
        UserError: shards are damaged or missing, sources do not match each other, a data set
            contains another tokenizer than it was encoded with, the model's vocabulary is too
            small, or the run needs more epochs than a source allows.
    """
    sources, vocab_size = config.data.all_sources, config.model.vocab_size
    corpora = [Corpus(Path(source.path) / split) for source in sources]
    tokenizers: list[str] = []
    for source, corpus in zip(sources, corpora, strict=True):
        if corpus.vocab_size > vocab_size:
            raise UserError(
                f"model.vocab_size: must be at least {corpus.vocab_size}, the vocabulary of "
                f"{source.path}, got {vocab_size}"
            )
        if (tokenizer := Path(source.path) / "tokenizer").exists():
            check_tokenizer(tokenizer, corpus.tokenizer_sha256)
            tokenizers.append(tokenizer_sha256(tokenizer))  # not the hash of earlier versions
        else:
            tokenizers.append(corpus.tokenizer_sha256)
        if tokenizers[-1] != tokenizers[0]:
            raise UserError(
                f"data.sources: must be encoded with the same tokenizer, but {source.path} and "
                f"{sources[0].path} were not (prepare both with one tokenizer)"
            )
    *earlier, last = config.phases
    phases = [RowPhase(phase.seq_len, phase.num_rows) for phase in earlier]
    num_rows = sum(phase.num_rows for phase in config.phases)
    rows = PackedRows(
        corpora,
        [source.weight for source in sources],
        [*phases, RowPhase(last.seq_len, None)],
        config.data.packing,
        config.run.seed,
        num_rows,
    )
    for source, epochs in zip(sources, rows.epochs(num_rows), strict=True):
        if source.max_epochs and epochs > source.max_epochs:
            raise UserError(
                f"data.sources: {source.path} must last for the run with at most max_epochs = "
                f"{source.max_epochs}, got {epochs:.2f} epochs (lower its weight below "
                f"{source.weight * source.max_epochs / epochs:.3g}, or lower train.steps)"
            )
    return rows
