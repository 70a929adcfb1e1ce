"""Serving packed rows: which row comes when is a pure function of (seed, global row index).

The whole state of the loader is how many rows the run has consumed. Neither the number of ranks nor
the micro-batch is part of the order: they only decide who reads which row, or which slice of it.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class RowStage:
    """Rows of one length: `num_rows` of them, or None for the last stage, which has no end."""

    seq_len: int
    num_rows: int | None


class PackedRows:
    """The rows of a run in order: sources mixed by weight, stages one after another.

    Args:
        corpora: the sources.
        weights: their shares of the rows, in any unit.
        stages: the last one has no end.
        packing: "best_fit" or "concat".
        seed: of the run.
        num_rows: how many rows the run will ask for.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        weights: Sequence[float],
        stages: Sequence[RowStage],
        packing: str,
        seed: int,
        num_rows: int,
    ) -> None:
        self.corpora, self.stages, self.num_rows = corpora, stages, num_rows
        self.mix = Mix(weights, num_rows)
        sizes = [stage.num_rows or 0 for stage in stages]
        self._stage_first = list(itertools.accumulate(sizes[:-1], initial=0))
        self.sources = []
        for source, corpus in enumerate(corpora):
            counts = [self.mix.count(source, first) for first in self._stage_first]
            own = [b - a for a, b in itertools.pairwise(counts)]
            wanted = [(s.seq_len, n) for s, n in zip(stages, [*own, None], strict=True)]
            self.sources.append(SourceRows(corpus.lengths, wanted, packing, seed))
        identity = [
            [corpus.fingerprint for corpus in corpora],
            self.mix.shares,
            [(stage.seq_len, stage.num_rows) for stage in stages],
            packing,
            seed,
        ]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        # Makes every plan that the run will need: 4 s for a million documents are too long for a
        # step in which an epoch happens to end.
        self.epochs(num_rows)

    def seq_len(self, index: int) -> int:
        """Tokens in global row `index`."""
        return self.stages[self._stage(index)].seq_len

    @property
    def tokenizer_sha256(self) -> str:
        """That of all sources."""
        return self.corpora[0].tokenizer_sha256

    def describe(self) -> list[str]:
        """One line for each source: how much of it the run will take."""
        total = self.mix.period
        return [
            f"data: {corpus.name}: {corpus.num_tokens:,} tokens, {share / total:.1%} of the rows, "
            f"{epochs:.2f} epochs; rows are {rows.last_plan.fill:.2%} full"
            for corpus, share, rows, epochs in zip(
                self.corpora, self.mix.shares, self.sources, self.epochs(self.num_rows), strict=True
            )
        ]

    def epochs(self, num_rows: int) -> list[float]:
        """How many epochs of each source the first `num_rows` rows are."""
        stage = self._stage(num_rows)
        return [
            rows.epochs(stage, self._row_of_source(source, num_rows, stage))
            for source, rows in enumerate(self.sources)
        ]

    def num_tokens(self, num_rows: int) -> int:
        """Tokens of the first `num_rows` rows, padding not counted."""
        stage = self._stage(num_rows)
        return sum(
            rows.num_tokens(stage, self._row_of_source(source, num_rows, stage))
            for source, rows in enumerate(self.sources)
        )

    def batch(self, indices: range, tokens: slice = slice(None), *, pin: bool = False) -> Batch:
        """The slice `tokens` of the global rows `indices`, all of one stage; only it is read."""
        first, stop, _ = tokens.indices(self.seq_len(indices[0]))
        shape = (len(indices), stop - first)
        (ids, a), (labels, b), (doc_start, c) = (
            _new(shape, dtype, pin) for dtype in (torch.int64, torch.int64, torch.int32)
        )
        digest, row_tokens = 0, []
        for index, *row in zip(indices, a, b, c, strict=True):
            row_tokens.append(self._fill(index, first, *row))
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
        """The documents that the rows `indices` hold: their number in their source, and its name
        where there are several."""
        found: set[tuple[int, int]] = set()
        for index in indices:
            source, plan, row = self._locate(index)
            pieces = slice(plan.row_first[row], plan.row_first[row + 1])
            found.update((source, document) for document in plan.pieces.document[pieces].tolist())
        names = [f"{corpus.name}:" if len(self.corpora) > 1 else "" for corpus in self.corpora]
        return [f"{names[source]}{document}" for source, document in sorted(found)]

    def _stage(self, index: int) -> int:
        return bisect.bisect_right(self._stage_first, index) - 1

    def _row_of_source(self, source: int, index: int, stage: int) -> int:
        """How many rows of a source the stage has before global row `index`."""
        count = self.mix.count
        return count(source, index) - count(source, self._stage_first[stage])

    def _locate(self, index: int) -> tuple[int, RowPlan, int]:
        stage, source = self._stage(index), self.mix.source(index)
        row = self._row_of_source(source, index, stage)
        return source, *self.sources[source].locate(stage, row)

    def _fill(
        self,
        index: int,
        first: int,
        tokens: NDArray[np.int64],
        labels: NDArray[np.int64],
        doc_start: NDArray[np.int32],
    ) -> int:
        """Write tokens first ... first + len(tokens) of a row; where it is padded, `tokens` is 0,
        `labels` is ignored, and each token is a document. Returns where the padding begins."""
        source, plan, row = self._locate(index)
        corpus, stop = self.corpora[source], first + len(tokens)
        pieces = plan.pieces[plan.row_first[row] : plan.row_first[row + 1]]
        end = 0
        if len(tokens) < plan.seq_len:  # only the pieces that reach into the slice
            ends = np.cumsum(pieces.length)
            low, high = np.searchsorted(ends, [first, stop - 1], side="right")
            end = int(ends[low - 1]) if low else 0
            pieces = pieces[low : high + 1]
        columns = (
            pieces.start,
            pieces.length,
            corpus.shard_of(pieces.document),
            corpus.begins[pieces.document],
            corpus.lengths[pieces.document],
        )
        # Rows have few pieces: plain integers are faster here than small arrays.
        for start, length, shard, at, whole in zip(*(c.tolist() for c in columns), strict=True):
            begin, end = end, end + length
            a, b = max(begin - first, 0), min(end, stop) - first
            start += a + first - begin
            # One token more than is here, where the document goes on: the last label.
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
    """A tensor to fill, and its memory, which NumPy makes faster than PyTorch where it is plain."""
    if pin:
        tensor = torch.empty(shape, dtype=dtype, pin_memory=True)
        return tensor, tensor.numpy()
    array = np.empty(shape, np.int32 if dtype == torch.int32 else np.int64)
    return torch.from_numpy(array), array


def _digest(index: int, first: int, tokens: NDArray[np.int64], doc_start: NDArray[np.int32]) -> int:
    """Sum over tokens of (token, document start) times words that place and row determine."""
    words = _words(first + len(tokens))[:, first:]
    place = int(words[0] @ tokens.view(np.uint64)) + int(words[1] @ doc_start.astype(np.uint64))
    return place * (_mixed(index) | 1) & _WORD


def _mixed(number: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014): neighbours get words that have nothing in common."""
    word = (number + 1) * 0x9E3779B97F4A7C15 & _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


@cache
def _words(seq_len: int) -> NDArray[np.uint64]:
    """[2, seq_len] odd random words, fixed for ever."""
    return np.stack([np.random.Philox(key).random_raw(seq_len) | 1 for key in (1, 2)])


def open_rows(config: Config, split: str, *, verify: bool) -> PackedRows:
    """Open a split of every configured source.

    Raises:
        UserError: damaged or missing shards, sources that do not go together, a tokenizer beside
            them that is not theirs, token ids that the model's vocabulary lacks, or more epochs
            than a source allows.
    """
    sources, vocab_size = config.data.all_sources, config.model.vocab_size
    corpora = [Corpus(Path(source.path) / split, verify=verify) for source in sources]
    tokenizers: list[str] = []
    for source, corpus in zip(sources, corpora, strict=True):
        if corpus.vocab_size > vocab_size:
            raise UserError(
                f"model.vocab_size: {vocab_size} is smaller than that of {source.path} "
                f"({corpus.vocab_size})"
            )
        if (tokenizer := Path(source.path) / "tokenizer").exists():
            check_tokenizer(tokenizer, corpus.tokenizer_sha256)
            tokenizers.append(tokenizer_sha256(tokenizer))  # not the hash of earlier versions
        else:
            tokenizers.append(corpus.tokenizer_sha256)
        if tokenizers[-1] != tokenizers[0]:
            raise UserError(
                f"data.sources: {source.path} and {sources[0].path} were encoded with different "
                "tokenizers (prepare both with one)"
            )
    *earlier, last = config.stages
    stages = [RowStage(stage.seq_len, stage.num_rows) for stage in earlier]
    num_rows = sum(stage.num_rows for stage in config.stages)
    rows = PackedRows(
        corpora,
        [source.weight for source in sources],
        [*stages, RowStage(last.seq_len, None)],
        config.data.packing,
        config.run.seed,
        num_rows,
    )
    for source, epochs in zip(sources, rows.epochs(num_rows), strict=True):
        if source.max_epochs and epochs > source.max_epochs:
            raise UserError(
                f"data.sources: the run takes {epochs:.2f} epochs of {source.path}, max_epochs is "
                f"{source.max_epochs} (lower its weight below "
                f"{source.weight * source.max_epochs / epochs:.3g}, or train.steps)"
            )
    return rows
