"""What long context buys: the loss with the whole context against that with the last tokens only.

A curve over length that stays flat may hide a model that ignores its context. Here each token is
predicted twice, with all that precedes it in the window and with about the last `near` tokens only.
A model that does not use what lies further back has a gain of zero.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .bootstrap import mean_over_documents
from .model import EvaluatedModel
from .perplexity import Losses, window_losses
from .results import Attribution, Gain
from .text import Spans


def near_losses(model: EvaluatedModel, spans: Spans, near: int) -> Losses:
    """The loss of each token from the last tokens before it alone.

    Each window predicts the tokens behind its first `near` ones, near / 4 of them (more where ranks
    share windows, which must then be longer). So a token sees `near` to 1.25 x `near` tokens: the
    gain is, if anything, understated.
    """
    unit = model.window_unit
    window = min(-(-(near + near // 4) // unit) * unit, spans.length)
    return window_losses(model, spans, window, window - near, f"last {near:,} tokens only")


def attribute(
    near_table: Losses,
    full_table: Losses,
    document: NDArray[np.int64],
    length: int,
    near: int,
    seed: int,
) -> Attribution:
    """Gains by position in windows of `length`, in buckets that double from `near` on."""
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
    return Attribution(length=length, near=near, total=gain(near, length), buckets=buckets)
