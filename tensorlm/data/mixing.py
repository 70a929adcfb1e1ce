"""Which source the n-th row of a run comes from: exact shares at every prefix.

With the weights as integers a_i of sum W, source i has had n * a_i / W rows after n rows, give or
take less than one. This is Tijdeman's algorithm ("The chairman assignment problem", 1980): of the
sources that have fallen far enough behind, the one that must come soonest is next. The sequence
has period W, so that any place in it is found without walking there.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


class Mix:
    """An infinite sequence of sources; `num_rows` is how far it will be asked for."""

    def __init__(self, weights: Sequence[float], num_rows: int) -> None:
        self.shares = _integers(weights)
        self.period = sum(self.shares)
        self._source = _tijdeman(self.shares, min(self.period, num_rows))
        # [K, n + 1]: rows of each source among the first n of a period.
        is_source = self._source == np.arange(len(weights))[:, None]
        self._before = np.cumsum(np.pad(is_source, ((0, 0), (1, 0))), axis=1)

    def source(self, row: int) -> int:
        """Index of the source of row `row`."""
        return int(self._source[row % self.period])

    def count(self, source: int, num_rows: int) -> int:
        """How many of the first `num_rows` rows are of `source`."""
        periods, rest = divmod(num_rows, self.period)
        return periods * self.shares[source] + int(self._before[source, rest])


def _integers(weights: Sequence[float]) -> list[int]:
    """The smallest integers in the proportions of `weights`, read as the decimals they print as."""
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(f.denominator for f in fractions))
    numbers = [int(f * scale) for f in fractions]
    divisor = math.gcd(*numbers)
    return [number // divisor for number in numbers]


def _tijdeman(shares: list[int], num_rows: int) -> NDArray[np.int64]:
    """Source of each of the first rows; all in integers, so exact."""
    total, slack = sum(shares), max(1, 2 * len(shares) - 2)
    counts = [0] * len(shares)
    sequence = np.empty(num_rows, dtype=np.int64)
    for n in range(1, num_rows + 1):
        best, soonest = -1, 0
        for i, share in enumerate(shares):
            behind = slack * (n * share - counts[i] * total)  # rows owed, times slack * total
            if behind < total:
                continue
            # How many rows it can still wait before it is 1 - 1/slack rows behind.
            wait = ((slack - 1) * total - behind) // (slack * share)
            if best < 0 or wait < soonest:
                best, soonest = i, wait
        counts[best] += 1
        sequence[n - 1] = best
    return sequence
