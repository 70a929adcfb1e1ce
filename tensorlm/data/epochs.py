"""The rows of one source in all phases of a run: each token once per epoch, at any row length.

A phase takes as many shuffled documents of the current epoch as fill its rows, and packs them. The
next phase gets the other documents, and the parts that did not fit into the last rows. The last
phase has no fixed end: it takes the rest of the epoch, then whole epochs. In this code, a phase is
called a phase.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .packing import Int, Pieces, RowPlan, pack, plan_rows, shuffled

_ROWS, _DOCUMENTS = 0, 1  # what is permuted: part of the key of a permutation


class Stretch(NamedTuple):
    """What one phase takes from one epoch: the first `num_rows` rows of its shuffled plan."""

    phase: int
    epoch: int
    plan: RowPlan
    num_rows: int


class SourceRows:
    """The rows of one source, in order, phase by phase.

    Args:
        lengths: number of tokens of each document, at least 1.
        phases: (seq_len, rows of this source) of each phase; None for the last phase, without end.
        packing: "best_fit" or "concat".
        seed: seed of the run.
    """

    def __init__(
        self, lengths: Int, phases: Sequence[tuple[int, int | None]], packing: str, seed: int
    ) -> None:
        self._lengths, self._packing, self._seed = lengths, packing, seed
        self._num_tokens = int(lengths.sum())
        self._whole_plans: dict[int, RowPlan] = {}
        self._order = lru_cache(maxsize=2)(self._shuffled_rows)
        self._stretches: list[list[Stretch]] = []
        epoch = 0
        rest: Pieces | None = None  # the rest of the epoch; None: all of it
        for phase, (seq_len, num_rows) in enumerate(phases):
            self._stretches.append([])
            left = num_rows
            while left is None or left > 0:
                if rest is not None and not len(rest):
                    epoch, rest = epoch + 1, None
                stretch, rest = self._take(phase, epoch, rest, seq_len, left)
                self._stretches[-1].append(stretch)
                if left is None:
                    break
                left -= stretch.num_rows

    @property
    def last_plan(self) -> RowPlan:
        """The first plan of the last phase."""
        return self._stretches[-1][0].plan

    def locate(self, phase: int, row: int) -> tuple[RowPlan, int]:
        """The plan that holds row `row` of a phase (counted in this source), and its row there."""
        stretch, row = self._stretch(phase, row)
        order = self._order(stretch.phase, stretch.epoch, stretch.plan.num_rows)
        return stretch.plan, int(order[row])

    def epochs(self, phase: int, row: int) -> float:
        """Epochs in the rows before row `row` of a phase, counted in tokens."""
        return self.num_tokens(phase, row) / self._num_tokens

    def num_tokens(self, phase: int, row: int) -> int:
        """Number of tokens in all rows before row `row` of a phase, without padding."""
        if phase < 0:
            return 0
        if row == 0:
            return self.num_tokens(phase - 1, sum(s.num_rows for s in self._stretches[phase - 1]))
        last, at = self._stretch(phase, row - 1)
        order = self._order(last.phase, last.epoch, last.plan.num_rows)
        num_tokens = int(last.plan.row_tokens[order[: at + 1]].sum())
        for stretch in (s for stretches in self._stretches for s in stretches):
            if stretch.epoch == last.epoch and stretch.phase < last.phase:
                order = self._order(stretch.phase, stretch.epoch, stretch.plan.num_rows)
                num_tokens += int(stretch.plan.row_tokens[order[: stretch.num_rows]].sum())
        return last.epoch * self._num_tokens + num_tokens

    def _stretch(self, phase: int, row: int) -> tuple[Stretch, int]:
        for stretch in self._stretches[phase]:
            if row < stretch.num_rows:
                return stretch, row
            row -= stretch.num_rows
        assert phase == len(self._stretches) - 1, "row must be inside the phase"
        plan = self._whole_plan(stretch.plan.seq_len)
        epochs, row = divmod(row, plan.num_rows)
        return Stretch(phase, stretch.epoch + 1 + epochs, plan, plan.num_rows), row

    def _take(
        self, phase: int, epoch: int, rest: Pieces | None, seq_len: int, num_rows: int | None
    ) -> tuple[Stretch, Pieces]:
        """Plan at most `num_rows` rows from the front of `rest`; returns them and the new rest."""
        num_tokens = self._num_tokens if rest is None else rest.num_tokens
        nothing = Pieces(*np.empty((3, 0), np.int64))
        if num_rows is None or num_rows * seq_len >= num_tokens:
            taken, left = rest, nothing
        else:
            if rest is None:
                documents = shuffled(len(self._lengths), self._seed, _DOCUMENTS, epoch)
                rest = Pieces(documents, np.zeros_like(documents), self._lengths[documents])
            cut = int(np.searchsorted(np.cumsum(rest.length), num_rows * seq_len)) + 1
            taken, left = rest[:cut], rest[cut:]
        if taken is None:
            plan = self._whole_plan(seq_len)
        else:
            plan = pack(taken, seq_len, self._packing, self._seed)
        stretch = Stretch(phase, epoch, plan, min(num_rows or plan.num_rows, plan.num_rows))
        if stretch.num_rows < plan.num_rows:
            is_left = np.ones(plan.num_rows, dtype=bool)
            is_left[self._order(phase, epoch, plan.num_rows)[: stretch.num_rows]] = False
            pieces = plan.pieces[np.repeat(is_left, np.diff(plan.row_first))]
            left = Pieces(
                np.concatenate([pieces.document, left.document]),
                np.concatenate([pieces.start, left.start]),
                np.concatenate([pieces.length, left.length]),
            )
        return stretch, left

    def _whole_plan(self, seq_len: int) -> RowPlan:
        """The plan of a whole epoch; all epochs share it, and each shuffles its rows."""
        if seq_len not in self._whole_plans:
            plan = plan_rows(self._lengths, seq_len, self._packing, self._seed)
            self._whole_plans = {seq_len: plan}  # earlier lengths are not needed again
        return self._whole_plans[seq_len]

    def _shuffled_rows(self, phase: int, epoch: int, num_rows: int) -> Int:
        return shuffled(num_rows, self._seed, _ROWS, phase, epoch)
