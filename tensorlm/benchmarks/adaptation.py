"""A table of the cost and quality of adapted models, by kind of attention.

Each variant is a run that was evaluated: `RUN/config.toml` contains its settings, `RUN/code` and
`RUN/books` perplexities on two kinds of text, `RUN/needles` results of retrieval tasks. This module
measures nothing itself.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tensorlm.config import SETTINGS, Config, ModelConfig, load_config
from tensorlm.evaluation.results import Cell, Report, read_report
from tensorlm.model.flops import attention_flops, choice_flops, layer_pairs
from tensorlm.runtime.errors import UserError

TEXTS = ("code", "books")
LLAMA_8B = {
    "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "hidden_size": 4096,
    "intermediate_size": 14336, "head_dim": 0, "layers": (),
}  # fmt: skip
_LLAMA_8B_LENGTH = 131_072


class Variant(NamedTuple):
    """One adapted model.

    keys: number of tokens that a query reads in a layer, mean over queries and layers, by length.
    flops: FLOPs of attention and choice for Llama-8B's shape at 131,072 tokens, relative to full
    attention. losses: mean loss over the second half of each length, by (text, length). found:
    fraction of prompts answered correctly, by (task, length).
    """

    name: str
    keys: dict[int, float]
    flops: float
    losses: dict[tuple[str, int], float]
    found: dict[tuple[str, int], float]


def read_variants(runs: Sequence[Path]) -> list[Variant]:
    """The variants of these runs that have a report.

    Raises:
        UserError: settings or a report cannot be read, or there are no reports.
    """
    variants = [variant for run in runs if (variant := _read_variant(run))]
    if not variants:
        raise UserError(f"{runs[0]}: a run must be evaluated first (make adapt)")
    return variants


def _read_variant(run: Path) -> Variant | None:
    config = load_config(run / SETTINGS)
    losses: dict[tuple[str, int], float] = {}
    found: dict[tuple[str, int], float] = {}
    for text in TEXTS:
        if report := _report(run / text):
            for result in report.perplexity:
                losses[text, result.length] = result.buckets[-1].loss.mean
    if report := _report(run / "needles"):
        found |= _accuracies("passkey", report.passkey) | _accuracies("needle", report.niah)
        found |= {(score.task, score.length): score.score for score in report.ruler}
    if not losses and not found:
        return None
    lengths = sorted({length for _, length in (*losses, *found)})
    keys = {length: _keys(config.model, length) for length in lengths}
    return Variant(run.name, keys, attention_share(config), losses, found)


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
    at the shortest length.
    """
    lengths = sorted({length for v in variants for _, length in (*v.losses, *v.found)})
    texts = [text for text in TEXTS if any(text == t for v in variants for t, _ in v.losses)]
    tasks = sorted({task for v in variants for task, _ in v.found})
    by_name = {variant.name: variant for variant in variants}
    ends = (by_name[worst], by_name[best]) if {worst, best} <= set(by_name) else None
    head = ["attention", "keys at " + " / ".join(f"{n:,}" for n in lengths), "FLOPs at 128k"]
    for text in texts:
        head.append(f"loss, {text}, " + " / ".join(f"{n // 2:,}-{n:,}" for n in lengths))
    if ends:
        head.append("gap closed, " + " / ".join(texts))
    head += [f"{task} " + " / ".join(f"{n:,}" for n in lengths) for task in tasks]
    rows = [head, ["---"] * len(head)]
    for variant in variants:
        row = [variant.name, " / ".join(f"{variant.keys.get(n, 0):,.0f}" for n in lengths)]
        row.append(f"1 / {1 / variant.flops:.0f}" if variant.flops < 1 else "1")
        for text in texts:
            row.append(_cells([variant.losses.get((text, n)) for n in lengths], "{:.4f}"))
        if ends:
            row.append(_cells([_gap(variant, *ends, text, lengths[0]) for text in texts], "{:.0%}"))
        row += [_cells([variant.found.get((t, n)) for n in lengths], "{:.2f}") for t in tasks]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cells(values: Sequence[float | None], form: str) -> str:
    return " / ".join("-" if value is None else form.format(value) for value in values)


def _gap(variant: Variant, worst: Variant, best: Variant, text: str, length: int) -> float | None:
    losses = [v.losses.get((text, length)) for v in (worst, variant, best)]
    low, own, high = losses
    if low is None or own is None or high is None or low == high:
        return None
    return (low - own) / (low - high)
