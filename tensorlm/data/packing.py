"""Packing documents into rows of `seq_len` tokens: a pure function of lengths, mode and seed.

Documents longer than a row are cut at row length. Best-fit decreasing then puts each piece, longest
first, into the fullest row that still has room; `concat` fills rows in a shuffled document order
and cuts at every row end. The rows are shuffled at the end, since best fit sorts by length.
"""

import bisect
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]


@dataclass(frozen=True)
class RowPlan:
    """Which pieces of which documents make up each row.

    Pieces of row r are entries row_first[r] ... row_first[r + 1] of `document`, `start`, `length`.
    """

    seq_len: int
    document: Int
    start: Int
    length: Int
    row_first: Int

    @property
    def num_rows(self) -> int:
        return len(self.row_first) - 1

    @property
    def fill(self) -> float:
        """Share of the row slots that hold tokens."""
        return float(self.length.sum()) / (self.num_rows * self.seq_len)


def plan_rows(lengths: Int, seq_len: int, mode: str, seed: int) -> RowPlan:
    """Pack documents of `lengths` tokens into rows of `seq_len` ("best_fit" or "concat")."""
    rng = np.random.Generator(np.random.Philox(seed))
    if mode == "concat":
        pieces, row_of_piece = _concat(lengths, seq_len, rng)
    else:
        pieces = _split(np.arange(len(lengths)), lengths, seq_len)
        row_of_piece = _best_fit_decreasing(pieces[2], seq_len)
    num_rows = int(row_of_piece.max()) + 1
    row_of_piece = rng.permutation(num_rows)[row_of_piece]
    order = np.argsort(row_of_piece, kind="stable")
    document, start, length = (part[order] for part in pieces)
    row_first = np.searchsorted(row_of_piece[order], np.arange(num_rows + 1))
    return RowPlan(seq_len, document, start, length, row_first.astype(np.int64))


def _split(documents: Int, lengths: Int, seq_len: int) -> tuple[Int, Int, Int]:
    """Cut every document into pieces of at most `seq_len`: (document, start, length)."""
    counts = -(-lengths // seq_len)
    document = np.repeat(documents, counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(document)) - first) * seq_len
    length = np.minimum(np.repeat(lengths, counts) - start, seq_len)
    return document, start, length


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


def _concat(
    lengths: Int, seq_len: int, rng: np.random.Generator
) -> tuple[tuple[Int, Int, Int], Int]:
    """Pieces of the shuffled documents laid end to end, cut at row ends; and their rows."""
    documents = rng.permutation(len(lengths))
    ends = np.cumsum(lengths[documents])
    begins = ends - lengths[documents]
    cuts = np.arange(0, int(ends[-1]), seq_len)
    begin = np.union1d(begins[lengths[documents] > 0], cuts)
    length = np.diff(np.append(begin, ends[-1]))
    at = np.searchsorted(begins, begin, side="right") - 1
    return (documents[at], begin - begins[at], length), begin // seq_len
