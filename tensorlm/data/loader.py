"""Serving packed rows: which row comes when is a pure function of (seed, global row index).

The whole state of the loader is how many rows the run has consumed. Neither the number of ranks nor
the micro-batch is part of the order: they only decide who reads which row.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tensorlm.config import Config
from tensorlm.errors import UserError
from tensorlm.loss import IGNORED

from .packing import RowPlan, plan_rows
from .shards import Corpus


@dataclass(frozen=True)
class Batch:
    """Rows, or one slice of them, for one forward pass.

    tokens, labels: [B, T] int64; doc_start: [B, T] int32, an index in the row; first_token: where
    in the row the slice begins.
    """

    tokens: Tensor
    labels: Tensor
    doc_start: Tensor
    first_token: int = 0

    @property
    def num_labels(self) -> int:
        """Tokens that have something to predict."""
        return int((self.labels != IGNORED).sum())

    @property
    def depth(self) -> Tensor:
        """[B, T] int64: how many tokens of its document precede each token."""
        return torch.arange(self.tokens.shape[1]) + self.first_token - self.doc_start

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, doc_start, labels) on `device`: the arguments of `Llama.forward`."""
        return self.tokens.to(device), self.doc_start.to(device), self.labels.to(device)


class PackedRows:
    """The rows of one split, in the run's order."""

    def __init__(self, folder: str | Path, seq_len: int, packing: str, seed: int) -> None:
        self.corpus = Corpus(folder)
        self.plan: RowPlan = plan_rows(self.corpus.lengths, seq_len, packing, seed)
        self.seed = seed
        identity = f"{self.corpus.fingerprint} {seq_len} {packing} {seed}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def row(
        self, index: int, tokens: slice = slice(None)
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
        """Tokens, labels and document starts of global row `index` (rows repeat every epoch).

        Of the row, only the slice `tokens` is read.
        """
        epoch, position = divmod(index, self.plan.num_rows)
        first, stop, _ = tokens.indices(self.plan.seq_len)
        return self._fill(int(self._epoch_order(epoch)[position]), first, stop)

    def batch(self, indices: range, tokens: slice = slice(None)) -> Batch:
        """The slice `tokens` of the rows `indices` as one batch."""
        columns = zip(*(self.row(i, tokens) for i in indices), strict=True)
        ids, labels, doc_start = (torch.from_numpy(np.stack(c)) for c in columns)
        return Batch(ids, labels, doc_start, first_token=tokens.start or 0)

    def micro_batches(
        self, first_row: int, num_rows: int, micro_batch: int, tokens: slice = slice(None)
    ) -> list[Batch]:
        """Rows first_row ... first_row + num_rows, `micro_batch` rows at a time."""
        firsts = range(first_row, first_row + num_rows, micro_batch)
        return [self.batch(range(at, at + micro_batch), tokens) for at in firsts]

    def documents(self, indices: range) -> list[int]:
        """Indices in the corpus of the documents that the rows `indices` hold."""
        found: set[int] = set()
        for index in indices:
            epoch, position = divmod(index, self.plan.num_rows)
            row = int(self._epoch_order(epoch)[position])
            pieces = slice(self.plan.row_first[row], self.plan.row_first[row + 1])
            found.update(self.plan.document[pieces].tolist())
        return sorted(found)

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order = (epoch, rng.permutation(self.plan.num_rows))
        return self._order[1]

    def _fill(
        self, row: int, first: int, stop: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
        tokens = np.zeros(stop - first, np.int64)
        labels = np.full(stop - first, IGNORED, np.int64)
        doc_start = np.arange(first, stop, dtype=np.int32)  # padding: each token is a document
        end = 0
        for piece in range(self.plan.row_first[row], self.plan.row_first[row + 1]):
            document, start = int(self.plan.document[piece]), int(self.plan.start[piece])
            begin, end = end, end + int(self.plan.length[piece])
            low, high = max(begin, first), min(end, stop)
            if low >= high:
                continue
            # One token more than is here, where the document goes on: the last label.
            text = self.corpus.tokens(document, start + low - begin, start + high - begin + 1)
            here = slice(low - first, high - first)
            tokens[here] = text[: high - low]
            labels[here.start : here.start + len(text) - 1] = text[1:]
            doc_start[here] = begin
        return tokens, labels, doc_start


def open_rows(config: Config, split: str) -> PackedRows:
    """Open a split of the configured data set.

    Raises:
        UserError: damaged or missing shards, or token ids that the model's vocabulary lacks.
    """
    data, vocab_size = config.data, config.model.vocab_size
    rows = PackedRows(Path(data.path) / split, data.seq_len, data.packing, config.run.seed)
    if rows.corpus.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size: {vocab_size} is smaller than that of {data.path} "
            f"({rows.corpus.vocab_size})"
        )
    return rows
