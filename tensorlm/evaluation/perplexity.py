"""Perplexity by context length, on the same held-out text at every length."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from tensorlm.data.shards import Corpus
from tensorlm.errors import UserError


@dataclass(frozen=True)
class LengthResult:
    """Perplexity with windows of `length` tokens; `loss` in nats per token."""

    length: int
    loss: float
    perplexity: float
    num_tokens: int
    seconds: float


def evaluate_perplexity(
    model: nn.Module,
    data: Path,
    lengths: list[int],
    device: torch.device,
    max_tokens: int = 1 << 20,
) -> list[LengthResult]:
    """Cut held-out documents into windows of each length and measure the loss inside them.

    The documents are those that hold the longest length whole, cut to a multiple of it, so that
    every length predicts exactly the same tokens and only the context differs.

    Args:
        model: takes (tokens, doc_start, labels) and returns the summed loss.
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
    model: nn.Module, segments: list[torch.Tensor], length: int, device: torch.device
) -> LengthResult:
    started, loss_sum, num_tokens = time.perf_counter(), 0.0, 0
    total = sum(len(segment) - 1 for segment in segments)
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc=f"length {length:>7,}") as bar:
        for segment in segments:
            for start in range(0, len(segment) - 1, length):
                window = segment[start : start + length + 1].to(device)[None]
                loss_sum += float(model(window[:, :-1], None, window[:, 1:]))
                num_tokens += length
                bar.update(length)
    loss = loss_sum / num_tokens
    seconds = time.perf_counter() - started
    return LengthResult(length, loss, math.exp(min(loss, 700.0)), num_tokens, seconds)
