"""Means over tokens with bootstrap intervals over documents.

Tokens of one document are not independent, so whole documents are resampled.
"""

import numpy as np
from numpy.typing import NDArray

from .results import Mean

_RESAMPLES = 1000


def mean_over_documents(
    values: NDArray[np.floating], document: NDArray[np.int64], seed: int
) -> Mean:
    """Mean of all values, and the interval that contains 95 % of the resampled means.

    Args:
        values: [S, N], values of the N tokens of S spans.
        document: [S], the document of each span.
        seed: seed of the resampling.
    """
    wide = values.astype(np.float64)
    mean = float(wide.mean())
    _, owner = np.unique(document, return_inverse=True)
    num_documents = int(owner.max()) + 1
    if num_documents < 2:
        return Mean(mean=mean)
    sums = np.bincount(owner, weights=wide.sum(axis=1), minlength=num_documents)
    counts = np.bincount(owner, minlength=num_documents) * values.shape[1]
    rng = np.random.Generator(np.random.Philox(key=seed))
    drawn = rng.integers(num_documents, size=(_RESAMPLES, num_documents))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Mean(mean=mean, low=float(low), high=float(high))
