"""A table of the cost and quality of adapted models, by kind of attention.

Each variant is a run that was evaluated, or several that differ in their seed (`NAME`, `NAME-1`,
...): `RUN/config.toml` contains its settings, `RUN/code` and `RUN/books` perplexities on two kinds
of text, `RUN/needles` results of retrieval tasks. This module measures nothing itself.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch

from tensorlm.config import SETTINGS, Config, ModelConfig, load_config
from tensorlm.config.layer_words import attention_in_words
from tensorlm.evaluation.results import Cell, Report, read_report
from tensorlm.model.flops import attention_flops, choice_flops, layer_pairs
from tensorlm.runtime.errors import UserError

from .markdown import table_head, table_row

TEXTS = ("code", "books")
LLAMA_8B = {
    "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "hidden_size": 4096,
    "intermediate_size": 14336, "head_dim": 0, "layers": (),
}  # fmt: skip
_LLAMA_8B_LENGTH = 131_072


class Seed(NamedTuple):
    """What one run gave.

    losses: mean loss over the second half of each length, by (text, length). found: fraction of
    prompts answered correctly, by (task, length).
    """

    losses: dict[tuple[str, int], float]
    found: dict[tuple[str, int], float]


class Variant(NamedTuple):
    """One kind of attention, with one or more adapted models.

    words: the kind of attention in words.
    keys: number of tokens that a query reads in a layer, mean over queries and layers, by length.
    flops: FLOPs of attention and choice for Llama-8B's shape at 131,072 tokens, relative to full
    attention. seeds: results, by the run's seed.
    """

    name: str
    words: str
    keys: dict[int, float]
    flops: float
    seeds: dict[int, Seed]


def read_variants(runs: Sequence[Path]) -> list[Variant]:
    """The variants of these runs that have a report.

    Raises:
        UserError: settings or a report cannot be read, or there are no reports.
    """
    variants: dict[str, Variant] = {}
    for run in runs:
        config = load_config(run / SETTINGS)
        seed = _read_seed(run)
        if not seed.losses and not seed.found:
            continue
        name = re.sub(r"-\d+$", "", run.name)
        if name not in variants:
            lengths = sorted({length for _, length in (*seed.losses, *seed.found)})
            keys = {length: _keys(config.model, length) for length in lengths}
            words = attention_in_words(config.model)
            variants[name] = Variant(name, words, keys, attention_share(config), {})
        variants[name].seeds[config.run.seed] = seed
    if not variants:
        raise UserError(f"{runs[0]}: a run must be evaluated first (make adapt)")
    return list(variants.values())


def _read_seed(run: Path) -> Seed:
    losses: dict[tuple[str, int], float] = {}
    found: dict[tuple[str, int], float] = {}
    for text in TEXTS:
        if report := _report(run / text):
            for result in report.perplexity:
                losses[text, result.length] = result.buckets[-1].loss.mean
    if report := _report(run / "needles"):
        found |= _accuracies("passkey", report.passkey) | _accuracies("needle", report.niah)
        found |= {(score.task, score.length): score.score for score in report.ruler}
    return Seed(losses, found)


def _report(folder: Path) -> Report | None:
    file = folder / "report.json"
    return read_report(file) if file.exists() else None


def _accuracies(task: str, cells: Sequence[Cell]) -> dict[tuple[str, int], float]:
    lengths = {cell.length for cell in cells}
    return {
        (task, length): _accuracy([cell for cell in cells if cell.length == length])
        for length in lengths
    }


def _accuracy(cells: Sequence[Cell]) -> float:
    count = sum(cell.num_samples for cell in cells)
    return sum(cell.accuracy * cell.num_samples for cell in cells) / count


def _keys(model: ModelConfig, length: int) -> float:
    depth = torch.arange(length)
    pairs = [layer_pairs(model, kind, depth) for kind in model.layer_kinds]
    return sum(pairs) / len(pairs) / length


def attention_share(config: Config) -> float:
    """`Variant.flops` of a configuration."""
    model = ModelConfig.model_validate(config.model.model_dump() | LLAMA_8B)
    plain = {"fold": (), "window": 0, "route": None, "full_every": 0, "route_every": 0}
    full = ModelConfig.model_validate(model.model_dump() | plain)
    depth = torch.arange(_LLAMA_8B_LENGTH)
    own = attention_flops(model, depth) + choice_flops(model, depth)
    return own / attention_flops(full, depth)


def format_table(variants: Sequence[Variant], worst: str = "window", best: str = "full") -> str:
    """A Markdown table with one row per variant.

    The gap closed is (loss of `worst` - loss of the variant) / (loss of `worst` - loss of `best`),
    at the shortest length and for equal seeds. A cell of several seeds is their mean ± standard
    deviation.
    """
    seeds = [seed for variant in variants for seed in variant.seeds.values()]
    lengths = sorted({length for seed in seeds for _, length in (*seed.losses, *seed.found)})
    texts = [text for text in TEXTS if any(text == t for seed in seeds for t, _ in seed.losses)]
    tasks = sorted({task for seed in seeds for task, _ in seed.found})
    by_name = {variant.name: variant for variant in variants}
    ends = (by_name[worst], by_name[best]) if {worst, best} <= set(by_name) else None
    head = ["attention", "keys at " + " / ".join(f"{n:,}" for n in lengths), "FLOPs at 128k"]
    for text in texts:
        head.append(f"loss, {text}, " + " / ".join(f"{n // 2:,}-{n:,}" for n in lengths))
    if ends:
        head.append("gap closed, " + " / ".join(texts))
    head += [f"{task} " + " / ".join(f"{n:,}" for n in lengths) for task in tasks]
    lines = [table_head(head)]
    for variant in variants:
        row = [variant.name, " / ".join(f"{variant.keys.get(n, 0):,.0f}" for n in lengths)]
        row.append(f"1 / {1 / variant.flops:.0f}" if variant.flops < 1 else "1")
        own = variant.seeds.values()
        for text in texts:
            row.append(_cells([[s.losses.get((text, n)) for s in own] for n in lengths], 4))
        if ends:
            gaps = [_gaps(variant, *ends, text, lengths[0]) for text in texts]
            row.append(_cells(gaps, 0, 100, " %"))
        row += [_cells([[s.found.get((t, n)) for s in own] for n in lengths], 2) for t in tasks]
        lines.append(table_row(row))
    return "\n".join(lines)


def explain_table(variants: Sequence[Variant], worst: str = "window", best: str = "full") -> str:
    """What the rows and columns of `format_table` mean, one line each."""
    seeds = [seed for variant in variants for seed in variant.seeds.values()]
    lines = [f"{variant.name}: {variant.words}" for variant in variants]
    lines.append("keys: tokens that a query reads in a layer by its own choice (mean)")
    lines.append(
        "FLOPs at 128k: of attention and choice, for Llama-8B's shape, relative to full attention"
    )
    if lengths := {length for seed in seeds for _, length in seed.losses}:
        lines.append("loss: nats per token of held-out text, in the second half of each length")
        if {worst, best} <= {variant.name for variant in variants}:
            lines.append(
                f"gap closed: difference in loss from {worst} at {min(lengths):,} tokens, as a "
                f"fraction of that between {worst} and {best}"
            )
    tasks = sorted({task for seed in seeds for task, _ in seed.found})
    lines += [f"{task}: fraction of prompts that were answered correctly" for task in tasks]
    return "\n".join(lines)


def _cells(
    columns: Sequence[Iterable[float | None]], digits: int, factor: int = 1, unit: str = ""
) -> str:
    return " / ".join(_mean(column, digits, factor, unit) for column in columns)


def _mean(values: Iterable[float | None], digits: int, factor: int, unit: str) -> str:
    known = [factor * value for value in values if value is not None]
    if not known:
        return "-"
    deviation = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{fmean(known):.{digits}f}{deviation}{unit}"


def _gaps(
    variant: Variant, worst: Variant, best: Variant, text: str, length: int
) -> list[float | None]:
    """The gap closed, for each seed of `variant` that the ends have as well."""
    gaps: list[float | None] = []
    for seed in sorted(variant.seeds.keys() & worst.seeds.keys() & best.seeds.keys()):
        low, own, high = (v.seeds[seed].losses.get((text, length)) for v in (worst, variant, best))
        if low is None or own is None or high is None or low == high:
            gaps.append(None)
        else:
            gaps.append((low - own) / (low - high))
    return gaps
