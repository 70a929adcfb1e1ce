"""Packing documents into rows of `seq_len` tokens: a pure function of lengths, mode and seed.

Documents longer than a row are cut at row length. Best-fit decreasing then puts each piece, longest
first, into the fullest row that still has room. `concat` fills rows in a shuffled document order
and cuts at each row end. The order of the rows is arbitrary: the loader shuffles them.
"""

import bisect
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Parts of documents: tokens start ... start + length of `document`, for each index."""

    document: Int
    start: Int
    length: Int

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, which: Int | slice) -> "Pieces":
        return Pieces(self.document[which], self.start[which], self.length[which])

    @property
    def num_tokens(self) -> int:
        return int(self.length.sum())


@dataclass(frozen=True)
class RowPlan:
    """The pieces of each row: row r has pieces[row_first[r] : row_first[r + 1]]."""

    seq_len: int
    pieces: Pieces
    row_first: Int

    @property
    def num_rows(self) -> int:
        return len(self.row_first) - 1

    @cached_property
    def row_tokens(self) -> Int:
        """[num_rows]: number of tokens in each row."""
        return np.add.reduceat(self.pieces.length, self.row_first[:-1])

    @property
    def fill(self) -> float:
        """Share of the row slots that hold tokens."""
        return self.pieces.num_tokens / (self.num_rows * self.seq_len)


def shuffled(count: int, *key: int) -> Int:
    """A permutation of range(count) that depends only on `key`, in all versions of numpy.

    It sorts raw random words: numpy guarantees that these never change, but not `permutation`.
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(words, kind="stable")


def plan_rows(lengths: Int, seq_len: int, mode: str, seed: int) -> RowPlan:
    """Pack whole documents of `lengths` tokens into rows of `seq_len`."""
    documents = np.arange(len(lengths))
    return pack(Pieces(documents, np.zeros_like(documents), lengths), seq_len, mode, seed)


def pack(parts: Pieces, seq_len: int, mode: str, seed: int) -> RowPlan:
    """Pack parts of documents into rows of `seq_len`; the result does not depend on their order.

    Args:
        parts: at least one part; parts must not be empty or overlap.
        seq_len: tokens in a row.
        mode: "best_fit" or "concat".
        seed: seed of the document order of `concat`.
    """
    parts = _joined(parts)
    if mode == "concat":
        pieces, row_of_piece = _concat(parts, seq_len, seed)
    else:
        pieces = _split(parts, seq_len)
        row_of_piece = _best_fit_decreasing(pieces.length, seq_len)
    order = np.argsort(row_of_piece, kind="stable")
    num_rows = int(row_of_piece.max()) + 1
    row_first = np.searchsorted(row_of_piece[order], np.arange(num_rows + 1))
    return RowPlan(seq_len, pieces[order], row_first.astype(np.int64))


def _joined(parts: Pieces) -> Pieces:
    """Sort parts by document, and join parts that are contiguous in a document."""
    if (np.diff(parts.document) > 0).all():
        return parts
    parts = parts[np.lexsort((parts.start, parts.document))]
    ends = parts.start + parts.length
    goes_on = (parts.document[1:] == parts.document[:-1]) & (parts.start[1:] == ends[:-1])
    first = np.flatnonzero(np.append(True, ~goes_on))
    return Pieces(parts.document[first], parts.start[first], np.add.reduceat(parts.length, first))


def _split(parts: Pieces, seq_len: int) -> Pieces:
    """Cut each part into pieces of at most `seq_len`."""
    counts = -(-parts.length // seq_len)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    offset = (np.arange(len(first)) - first) * seq_len
    length = np.minimum(np.repeat(parts.length, counts) - offset, seq_len)
    start = np.repeat(parts.start, counts) + offset
    return Pieces(np.repeat(parts.document, counts), start, length)


def _best_fit_decreasing(lengths: Int, seq_len: int) -> Int:
    """Row of each piece. `open_sizes` lists the distinct free sizes, sorted, for bisection."""
    rows = np.empty(len(lengths), dtype=np.int64)
    rows_with_free: dict[int, list[int]] = {}
    open_sizes: list[int] = []
    num_rows = 0
    for piece in np.argsort(-lengths, kind="stable"):
        length = int(lengths[piece])
        at = bisect.bisect_left(open_sizes, length)
        if at == len(open_sizes):
            row, free = num_rows, seq_len
            num_rows += 1
        else:
            free = open_sizes[at]
            row = rows_with_free[free].pop()
            if not rows_with_free[free]:
                del rows_with_free[free], open_sizes[at]
        rows[piece] = row
        left = free - length
        if left:
            if left not in rows_with_free:
                rows_with_free[left] = []
                bisect.insort(open_sizes, left)
            rows_with_free[left].append(row)
    return rows


def _concat(parts: Pieces, seq_len: int, seed: int) -> tuple[Pieces, Int]:
    """Concatenate the shuffled parts and cut at row ends; returns the pieces and their rows."""
    parts = parts[shuffled(len(parts), seed)]
    ends = np.cumsum(parts.length)
    begins = ends - parts.length
    begin = np.union1d(begins, np.arange(0, int(ends[-1]), seq_len))
    length = np.diff(np.append(begin, ends[-1]))
    at = np.searchsorted(begins, begin, side="right") - 1
    start = parts.start[at] + begin - begins[at]
    return Pieces(parts.document[at], start, length), begin // seq_len
