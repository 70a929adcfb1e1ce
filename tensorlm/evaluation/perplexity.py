"""Perplexity by context length, on the same held-out text at every length."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from tensorlm.data.shards import Corpus
from tensorlm.errors import UserError
from tensorlm.model import Llama


@dataclass(frozen=True)
class LengthResult:
    """Perplexity with windows of `length` tokens; `loss` in nats per token."""

    length: int
    loss: float
    perplexity: float
    num_tokens: int
    seconds: float


def evaluate_perplexity(
    model: Llama,
    data: Path,
    lengths: list[int],
    device: torch.device,
    max_tokens: int = 1 << 20,
) -> list[LengthResult]:
    """Cut held-out documents into windows of each length and measure the loss inside them.

    The documents are those that hold the longest length whole, cut to a multiple of it, so that
    every length predicts exactly the same tokens and only the context differs.

    Collective: the ranks of one row (`model.grid`) share each window, and different rows take turns
    with the documents. Every rank gets the results of all.

    Args:
        model: on each rank the same weights.
        data: data set; its `valid` split is read.
        lengths: window lengths, each a divisor of the longest.
        device: where the model is.
        max_tokens: stop after this many tokens.

    Raises:
        UserError: a length does not divide the longest, or no document is long enough.
    """
    longest = max(lengths)
    odd = [length for length in lengths if longest % length]
    if odd:
        raise UserError(f"--lengths: {odd[0]} does not divide {longest}")
    segments = _segments(Corpus(data / "valid"), longest, max_tokens)
    if not segments:
        available = int(Corpus(data / "valid").lengths.max())
        raise UserError(
            f"--lengths: no document in {data / 'valid'} has {longest} tokens "
            f"(the longest has {available}; choose shorter lengths)"
        )
    return [_one_length(model, segments, length, device) for length in sorted(lengths)]


def _segments(corpus: Corpus, longest: int, max_tokens: int) -> list[torch.Tensor]:
    """Token spans [longest + 1] of long documents; one more token, to be predicted last."""
    segments: list[torch.Tensor] = []
    for document in range(len(corpus)):
        for start in range(0, int(corpus.lengths[document]) - longest, longest):
            if (len(segments) + 1) * longest > max_tokens and segments:
                return segments
            tokens = corpus.tokens(document, start, start + longest + 1)
            segments.append(torch.from_numpy(tokens.astype("int64")))
    return segments


@torch.no_grad()
def _one_length(
    model: Llama, segments: list[torch.Tensor], length: int, device: torch.device
) -> LengthResult:
    grid, started = model.grid, time.perf_counter()
    here, own = grid.tokens(length), segments[grid.dp_rank :: grid.dp]
    loss_sum, num_tokens = 0.0, 0
    with tqdm(
        total=sum(len(segment) - 1 for segment in own), unit=" tokens", unit_scale=True,
        desc=f"length {length:>7,}", disable=grid.rank > 0,
    ) as bar:  # fmt: skip
        for segment in own:
            for start in range(0, len(segment) - 1, length):
                window = segment[start : start + length + 1].to(device)
                tokens, labels = window[None, :-1][:, here], window[None, 1:][:, here]
                loss_sum += float(model(tokens, None, labels))
                num_tokens += labels.numel()
                bar.update(length)
    totals = torch.tensor([loss_sum, num_tokens], dtype=torch.float64, device=device)
    if grid.world_size > 1:
        dist.all_reduce(totals)
    loss = float(totals[0] / totals[1])
    seconds = time.perf_counter() - started
    return LengthResult(length, loss, math.exp(min(loss, 700.0)), int(totals[1]), seconds)
