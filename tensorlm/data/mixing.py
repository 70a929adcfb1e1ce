"""The source of each row of a run, with exact shares in every prefix.

With the weights as integers a_i of sum W, source i has n * a_i / W of the first n rows, with an
error below one row. This is Tijdeman's algorithm ("The chairman assignment problem", 1980): of the
sources that are far enough behind, the one with the earliest deadline is next. The sequence has
period W, so any place in it can be found directly.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .packing import Int


class Mix:
    """An infinite sequence of sources; its first `num_rows` are computed at the start."""

    def __init__(self, weights: Sequence[float], num_rows: int) -> None:
        self.shares = _integers(weights)
        self.period = sum(self.shares)
        self._known = self._first_rows(num_rows)

    def source(self, row: int) -> int:
        """Index of the source of row `row`."""
        place = row % self.period
        return int(self._reaching(place + 1)[0][place])

    def count(self, source: int, num_rows: int) -> int:
        """Number of rows of `source` among the first `num_rows`."""
        periods, rest = divmod(num_rows, self.period)
        return periods * self.shares[source] + int(self._reaching(rest)[1][source, rest])

    def _reaching(self, num_rows: int) -> tuple[Int, Int]:
        if num_rows > len(self._known[0]):
            self._known = self._first_rows(2 * num_rows)
        return self._known

    def _first_rows(self, num_rows: int) -> tuple[Int, Int]:
        """The first n rows of a period: their sources [n], and the number of rows of each source
        before each place [K, n + 1]."""
        sources = _tijdeman(self.shares, min(self.period, num_rows))
        is_source = sources == np.arange(len(self.shares))[:, None]
        return sources, np.cumsum(np.pad(is_source, ((0, 0), (1, 0))), axis=1)


def _integers(weights: Sequence[float]) -> list[int]:
    """The smallest integers with the proportions of `weights`, taken as their printed decimals."""
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(f.denominator for f in fractions))
    numbers = [int(f * scale) for f in fractions]
    divisor = math.gcd(*numbers)
    return [number // divisor for number in numbers]


def _tijdeman(shares: list[int], num_rows: int) -> Int:
    """Source of each of the first rows, in exact integer arithmetic."""
    total, slack = sum(shares), max(1, 2 * len(shares) - 2)
    counts = [0] * len(shares)
    sequence = np.empty(num_rows, dtype=np.int64)
    for n in range(1, num_rows + 1):
        best, soonest = -1, 0
        for i, share in enumerate(shares):
            behind = slack * (n * share - counts[i] * total)  # rows owed, times slack * total
            if behind < total:
                continue
            # Number of rows after which it would be 1 - 1/slack rows behind.
            wait = ((slack - 1) * total - behind) // (slack * share)
            if best < 0 or wait < soonest:
                best, soonest = i, wait
        counts[best] += 1
        sequence[n - 1] = best
    return sequence
