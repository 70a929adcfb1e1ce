"""Prefetch of one rank's micro-batches: reads the next step's batches while this one computes.

It keeps no position: the caller passes the rows of each step. A wrong guess only costs time.
"""

from concurrent.futures import Future, ThreadPoolExecutor

from fold_parallel import Grid
from tensorlm.batch import Batch
from tensorlm.config import Config

from .loader import PackedRows


class Prefetch:
    """Serves this rank's share of `rows` on `grid`; in pinned memory if `pin`."""

    def __init__(self, rows: PackedRows, config: Config, grid: Grid, *, pin: bool) -> None:
        self._rows, self._config, self._grid, self._pin = rows, config, grid, pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: dict[tuple[int, int], Future[list[Batch]]] = {}

    def batches(self, step: int, first_row: int) -> list[Batch]:
        """This rank's part of step `step` (from 0), whose rows begin at global row `first_row`."""
        ahead = self._ahead.pop((step, first_row), None)
        batches = ahead.result() if ahead else self._read(step, first_row)
        self._ahead.clear()
        if step + 1 < self._config.train.steps:
            place = (step + 1, first_row + self._config.phase_at(step).rows_per_step)
            self._ahead[place] = self._thread.submit(self._read, *place)
        return batches

    def _read(self, step: int, first_row: int) -> list[Batch]:
        phase = self._config.phase_at(step)
        share = phase.rows_per_step // self._grid.dp
        return self._rows.micro_batches(
            first_row + self._grid.dp_rank * share,
            share,
            phase.micro_batch,
            self._grid.tokens(phase.seq_len),
            pin=self._pin,
        )
