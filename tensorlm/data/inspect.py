"""The content of a data set: counts, document lengths as text and plot, decoded samples."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .packing import plan_rows
from .shards import Corpus, open_shards
from .tokenizer.tokenizers import load_tokenizer

_BAR_WIDTH = 40
_NUM_BINS = 60


def length_histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int, int, int]]:
    """Histogram of lengths in powers of two: (low, high, documents, tokens), low <= n < high."""
    powers = np.frexp(lengths.astype(np.float64))[1] - 1  # floor(log2(length)), exact
    rows = []
    for power in range(int(powers.min()), int(powers.max()) + 1):
        held = lengths[powers == power]
        rows.append((1 << power, 2 << power, len(held), int(held.sum())))
    return rows


def is_empty(folder: Path) -> bool:
    """Whether a split has shards but no documents."""
    return not any(shard.header.num_documents for shard in open_shards(folder)[0])


def describe_split(folder: Path, seq_lens: list[int]) -> str:
    """Describe counts, length histogram and packing of one split, as text."""
    corpus = Corpus(folder)
    num_bytes = sum(shard.header.num_bytes for shard in corpus.shards)
    quantiles = np.quantile(corpus.lengths, [0.5, 0.9, 0.99]).astype(int)
    lines = [
        f"{folder}: {len(corpus):,} documents, {corpus.num_tokens:,} tokens, "
        f"{num_bytes:,} bytes of text in {len(corpus.shards)} shards",
        f"vocabulary {corpus.vocab_size:,}, {corpus.shards[0].header.dtype}, "
        f"{num_bytes / corpus.num_tokens:.2f} bytes per token, fingerprint "
        f"{corpus.fingerprint[:16]}",
        f"document length: mean {corpus.lengths.mean():,.0f}, median {quantiles[0]:,}, "
        f"90 % {quantiles[1]:,}, 99 % {quantiles[2]:,}, longest {corpus.lengths.max():,} tokens",
        "",
        f"{'length in tokens':>23} {'documents':>12} {'of tokens':>10}",
    ]
    rows = length_histogram(corpus.lengths)
    most = max(tokens for *_, tokens in rows)
    for low, high, documents, tokens in rows:
        bar = "#" * round(_BAR_WIDTH * tokens / most)
        share = tokens / corpus.num_tokens
        lines.append(f"{low:>11,}-{high - 1:>11,} {documents:>12,} {share:>10.2%} {bar}".rstrip())
    lines += ["", f"{'seq_len':>11} {'rows':>11} {'filled':>12} {'uncut':>10}"]
    for seq_len in seq_lens:
        plan = plan_rows(corpus.lengths, seq_len, "best_fit", 0)
        whole = float((corpus.lengths <= seq_len).mean())
        lines.append(f"{seq_len:>11,} {plan.num_rows:>11,} {plan.fill:>12.3%} {whole:>10.2%}")
    lines.append("(filled: share of row slots with tokens; uncut: share of documents not cut)")
    return "\n".join(lines)


def sample_documents(data: Path, split: str, count: int, width: int = 160) -> list[str]:
    """Beginnings of `count` documents spread over the split, decoded with the data's tokenizer."""
    corpus, tokenizer = Corpus(data / split), load_tokenizer(data / "tokenizer")
    lines = []
    for document in np.linspace(0, len(corpus) - 1, min(count, len(corpus))).astype(int):
        ids = corpus.tokens(document, 1, width + 1)
        text = repr(tokenizer.decode(ids)[:width])
        lines.append(f"document {document:,} ({corpus.lengths[document]:,} tokens): {text}")
    return lines


def plot_lengths(folders: list[Path], path: Path) -> None:
    """Write a histogram of document lengths, weighted by tokens, as a PNG."""
    figure = lengths_figure({str(folder): Corpus(folder).lengths for folder in folders})
    figure.savefig(path, dpi=120)


def lengths_figure(lengths_of: dict[str, NDArray[np.int64]]) -> Any:
    """A matplotlib figure with histograms of document lengths ([D], tokens), weighted by tokens.

    The axis reaches from the shortest to the longest document.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    shortest = int(min(lengths.min() for lengths in lengths_of.values()))
    longest = int(max(lengths.max() for lengths in lengths_of.values()))
    edges = np.unique(np.geomspace(shortest, longest + 1, _NUM_BINS + 1).round())
    for name, lengths in lengths_of.items():
        share = lengths / lengths.sum()
        axes.hist(lengths, bins=edges, weights=share, histtype="stepfilled", alpha=0.5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlim(shortest, longest + 1)
    ticks = _ticks(shortest, longest)
    axes.set_xticks(ticks, [_short(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("document length (tokens)")
    axes.set_ylabel("share of the tokens")
    axes.legend()
    return figure


def _ticks(shortest: int, longest: int) -> list[int]:
    """At most ten evenly spaced powers of two; both ends if there are fewer than two."""
    first, last = (shortest - 1).bit_length(), longest.bit_length() - 1
    powers = range(first, last + 1, max(1, -(-(last + 1 - first) // 10)))
    return [1 << power for power in powers] if len(powers) > 1 else sorted({shortest, longest})


def _short(length: int) -> str:
    """Format a length as 600, 4k or 1M."""
    for factor, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if length % factor == 0:
            return f"{length // factor}{unit}"
    return f"{length:,}"
