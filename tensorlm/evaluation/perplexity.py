"""Perplexity by context length and by position, on the same held-out tokens at all lengths.

All results come from tables with the loss of each token of the spans, in windows of some length.
`window_losses` measures these tables; the rest is arithmetic on them.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tensorlm.config.evaluation import windows_at_once

from .bootstrap import mean_over_documents
from .model import EvaluatedModel
from .ranks import compute_and_sum, progress
from .results import Bucket, LengthResult, Ratio
from .text import Spans

_FIRST_BUCKET = 256

# Loss of every token of the spans, [S, N].
Losses = NDArray[np.float64]


def window_losses(
    model: EvaluatedModel, spans: Spans, length: int, stride: int, title: str
) -> Losses:
    """The loss of every token, from windows of `length` tokens that move by `stride`.

    The first window of a span gives the losses of all its tokens, each later window those of its
    last `stride` tokens. With stride = length, windows do not overlap. Otherwise every token except
    the first ones has length - stride to length - 1 tokens before it.

    Args:
        model: the model.
        spans: the spans; N must be at least `length`.
        length: tokens in a window.
        stride: tokens between the beginnings of windows, at most `length`.
        title: title of the progress bar.

    Raises:
        DoesNotFitError: memory ran out.
    """
    places = [
        (span, start, keep)
        for span in range(len(spans.tokens))
        for start, keep in _windows(spans.length, length, stride)
    ]
    batch = windows_at_once(spans.length, length)
    batches = [places[at : at + batch] for at in range(0, len(places), batch)]
    dp, dp_rank = model.grid.dp, model.grid.dp_rank
    mine = batches[dp_rank::dp]
    # ZeRO 3 gathers weights from all ranks in each pass, so all ranks must make the same number of
    # passes: a rank without a batch repeats the last one.
    num_idle = -(-len(batches) // dp) - len(mine)

    def measure() -> NDArray[np.float32]:
        losses = np.zeros((len(spans.tokens), spans.length), np.float32)
        with progress(sum(map(len, mine)) * length, "tok", title, model.grid) as bar:
            for part in mine:
                found = model.losses(_windows_of(spans, part, length))
                for (span, start, keep), row in zip(part, found, strict=True):
                    stop = start + length
                    losses[span, stop - keep : stop] = row[length - keep :]
                bar.update(len(part) * length)
            for _ in range(num_idle):
                model.losses(_windows_of(spans, batches[-1], length))
        return losses

    return compute_and_sum(measure, model.device, model.partners)


def _windows_of(spans: Spans, places: list[tuple[int, int, int]], length: int) -> Tensor:
    """Windows of `length` tokens plus one, [B, length + 1], from (span, start, _)."""
    rows = [spans.tokens[span, start : start + length + 1] for span, start, _ in places]
    return torch.from_numpy(np.stack(rows))


def _windows(num_tokens: int, length: int, stride: int) -> Iterator[tuple[int, int]]:
    """(start, number of its last tokens that count) of each window."""
    yield 0, length
    done = length
    while done < num_tokens:
        keep = min(stride, num_tokens - done)
        done += keep
        yield done - length, keep


def measure_length(
    model: EvaluatedModel, spans: Spans, length: int, slide: int, seed: int
) -> tuple[LengthResult, Losses]:
    """Perplexity with windows of `length`, and sliding by length / slide if slide > 1."""
    losses = window_losses(model, spans, length, length, f"perplexity {length:>7,}")
    sliding = None
    if slide > 1 and length < spans.length:
        title = f"   sliding {length:>7,}"
        sliding = window_losses(model, spans, length, max(1, length // slide), title)
    loss = mean_over_documents(losses, spans.document, seed)
    return (
        LengthResult(
            length=length,
            loss=loss.mean,
            perplexity=_exp(loss.mean),
            low=None if loss.low is None else _exp(loss.low),
            high=None if loss.high is None else _exp(loss.high),
            sliding_perplexity=None if sliding is None else _exp(float(sliding.mean())),
            num_tokens=losses.size,
            num_documents=len(np.unique(spans.document)),
            predicted=spans.sha256,
            buckets=loss_by_position(losses, spans.document, length, seed),
        ),
        losses,
    )


def loss_by_position(
    losses: Losses, document: NDArray[np.int64], length: int, seed: int
) -> list[Bucket]:
    """Mean loss by position in windows of `length`, in buckets whose ends double."""
    rows = losses.reshape(-1, length)
    owners = np.repeat(document, losses.shape[1] // length)
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, max(_FIRST_BUCKET, 2 * edges[-1])))
    return [
        Bucket(start=a, stop=b, loss=mean_over_documents(rows[:, a:b], owners, seed))
        for a, b in pairwise(edges)
    ]


def compare_lengths(
    tables: dict[int, Losses], document: NDArray[np.int64], trained_length: int, seed: int
) -> list[Ratio]:
    """Perplexity at each longer length / perplexity at the trained length, if that was measured."""
    if trained_length not in tables:
        return []
    ratios = []
    for length, losses in sorted(tables.items()):
        if length <= trained_length:
            continue
        log_ratio = mean_over_documents(losses - tables[trained_length], document, seed)
        ratio = {k: None if v is None else _exp(v) for k, v in log_ratio.model_dump().items()}
        ratios.append(Ratio(length=length, multiple=length / trained_length, ratio=ratio))
    return ratios


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
