"""The gain from long context: the loss with the whole context, compared with the last tokens only.

A flat curve over length can hide a model that ignores its context. Therefore, each token is
predicted twice: from all tokens before it in the window, and from about the last `near` tokens. A
model that does not use more distant tokens has a gain of zero.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .bootstrap import mean_over_documents
from .model import EvaluatedModel
from .perplexity import Losses, window_losses
from .results import ContextGain, Gain
from .text import Spans


def near_losses(model: EvaluatedModel, spans: Spans, near: int) -> Losses:
    """The loss of each token, predicted only from the last tokens before it.

    Each window predicts the near / 4 tokens after its first `near` tokens (more if ranks share
    windows, which must then be longer). Each token thus reads `near` to 1.25 x `near` tokens, and
    the gain is a lower bound.
    """
    unit = model.window_unit
    window = min(-(-(near + near // 4) // unit) * unit, spans.length)
    return window_losses(model, spans, window, window - near, f"last {near:,} tokens only")


def context_gain(
    near_table: Losses,
    full_table: Losses,
    document: NDArray[np.int64],
    length: int,
    near: int,
    seed: int,
) -> ContextGain:
    """Gains by position in windows of `length`, in buckets whose ends double from `near` on."""
    near_rows, full_rows = near_table.reshape(-1, length), full_table.reshape(-1, length)
    owners = np.repeat(document, near_table.shape[1] // length)

    def gain(start: int, stop: int) -> Gain:
        short, whole = near_rows[:, start:stop], full_rows[:, start:stop]
        return Gain(
            start=start,
            stop=stop,
            near_loss=float(short.mean()),
            full_loss=float(whole.mean()),
            gain=mean_over_documents(short - whole, owners, seed),
        )

    edges = [near]
    while edges[-1] < length:
        edges.append(min(length, 2 * edges[-1]))
    buckets = [gain(a, b) for a, b in pairwise(edges)]
    return ContextGain(length=length, near=near, total=gain(near, length), buckets=buckets)
