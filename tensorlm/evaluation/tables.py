"""The tables of a report, for its pages and for the terminal."""

from typing import NamedTuple

from tensorlm.config.evaluation import RULER_TASKS

from .names import label
from .recall_summary import (
    layer_recall_of_others,
    recall_by_distance,
    recall_lengths,
    recall_of_all,
    recall_of_others,
)
from .results import Mean, Report, same_tokens

_NONE = "-"  # cell that was not measured or is unknown


class Table(NamedTuple):
    """One section of a report: title, text, numbers, and the figures above them."""

    title: str
    text: str
    header: list[str]
    rows: list[list[str]]
    figures: tuple[str, ...] = ()


def make_tables(reports: list[Report]) -> list[Table]:
    """The tables of one or several reports; with several, the first column names the model.

    Each maker begins a row with the model's name, which has no header yet.
    """
    makers = (
        _ratio_table,
        _perplexity_table,
        _context_gain_table,
        _recall_table,
        _recall_by_layer_table,
        _retrieval_table,
        _needle_blocks_table,
        _ruler_table,
        _cost_table,
    )
    tables = [make(reports) for make in makers]
    return [_with_needed_columns(table, len(reports) > 1) for table in tables if table.rows]


def _with_needed_columns(table: Table, is_named: bool) -> Table:
    """Put the header `model` over the first column, or remove that column; remove empty columns."""
    header = ["model", *table.header]
    filled = [i for i, cells in enumerate(zip(*table.rows, strict=True)) if set(cells) != {_NONE}]
    columns = filled if is_named else filled[1:]

    def kept(row: list[str]) -> list[str]:
        return [row[i] for i in columns]

    return table._replace(header=kept(header), rows=[kept(row) for row in table.rows])


def _perplexity_table(reports: list[Report]) -> Table:
    letters = _text_letters(reports)
    rows = [
        [
            label(report), f"{r.length:,}", f"{r.length / report.trained_length:.2f}",
            f"{r.loss:.4f}", f"{r.perplexity:.3f}", _interval(r.low, r.high, ".3f"),
            _NONE if r.sliding_perplexity is None else f"{r.sliding_perplexity:.3f}",
            f"{r.num_tokens:,}", f"{r.num_documents:,}", letters.get(r.predicted, _NONE),
        ]
        for report in reports
        for r in report.perplexity
    ]  # fmt: skip
    header = ["length", "x trained", "loss", "perplexity", "95 %", "sliding", "tokens",
              "documents", "text"]  # fmt: skip
    text = "All lengths predict the same held-out tokens, in windows that do not overlap."
    if letters:
        text = (
            "The rows predict different held-out tokens: compare only rows with the same letter "
            "in the column text (?: unknown). Windows do not overlap."
        )
    text += " The interval is a bootstrap over documents."
    if any(r.sliding_perplexity is not None for report in reports for r in report.perplexity):
        text += " Sliding windows overlap, so that each token has more context."
    return Table("Perplexity by length", text, header, rows,
                 ("perplexity", "positions"))  # fmt: skip


def _text_letters(reports: list[Report]) -> dict[str, str]:
    """A letter for each set of predicted tokens; empty if all sets are the same."""
    if same_tokens(reports):
        return {}
    predicted = [result.predicted for report in reports for result in report.perplexity]
    known = dict.fromkeys(p for p in predicted if p)
    return {"": "?", **{p: chr(ord("A") + i % 26) for i, p in enumerate(known)}}


def _ratio_table(reports: list[Report]) -> Table:
    rows = [
        [label(report), f"{r.length:,}", f"{r.multiple:g}", _with_interval(r.ratio, ".4f")]
        for report in reports
        for r in report.ratios
    ]
    text = (
        "Perplexity divided by that at the trained length, on the same tokens. Below 1, the longer "
        "context helps. The interval is a bootstrap over documents."
    )
    header = ["length", "x trained", "ratio (95 %)"]
    return Table("Beyond the trained length", text, header, rows, ("ratio",))


def _context_gain_table(reports: list[Report]) -> Table:
    rows = []
    for report in reports:
        for found in report.attribution:
            totals = [found.total] if len(found.buckets) > 1 else []
            for gain in (*found.buckets, *totals):
                where = f"{gain.start:,} - {gain.stop:,}"
                rows.append(
                    [
                        label(report), f"{found.length:,}", where, f"{found.near:,}",
                        f"{gain.near_loss:.4f}", f"{gain.full_loss:.4f}",
                        _with_interval(gain.gain, "+.4f"),
                    ]
                )  # fmt: skip
    text = (
        "The same tokens, predicted from only the last tokens and from the whole window. A model "
        "that ignores earlier tokens has no gain."
    )
    header = ["length", "positions", "last", "loss, last only", "loss, whole", "gain (95 %)"]
    return Table("Gain from long context", text, header, rows, ("attribution",))


def _recall_table(reports: list[Report]) -> Table:
    rows = [
        [
            label(report), f"{length:,}", blocks,
            *(f"{share:.1%}" for share in (found.mass, found.chosen, found.best, found.random)),
        ]
        for report in reports
        for length in recall_lengths(report)
        for blocks, found in (
            ("all", recall_of_all(report, length)),
            ("all but the first block", recall_of_others(report, length)),
            *(
                (f"{found.start:,} - {found.stop:,}", found)
                for found in recall_by_distance(report, length)
            ),
        )
    ]  # fmt: skip
    text = (
        "The attention that routed layers would give to tokens beyond the window if all blocks "
        "were open, and the share of it in open blocks (chosen). Best: the best choice of the "
        "same number of blocks. Random: the first block and random others. The first block of a "
        "document is always open; only the row of all distances includes it."
    )
    header = ["length", "distance", "of all attention", "chosen", "best", "random"]
    return Table("Recall of the choice", text, header, rows, ("recall",))


def _recall_by_layer_table(reports: list[Report]) -> Table:
    rows = [
        [
            label(report), f"{r.layer}", f"{r.length:,}", f"{r.beyond:.1%}", f"{r.first:.1%}",
            f"{others.chosen:.1%}", f"{others.best:.1%}", f"{others.random:.1%}", f"{r.opened:.1f}",
        ]
        for report in reports
        for r in report.recall
        if r.length == recall_lengths(report)[-1]
        for others in (layer_recall_of_others(r),)
    ]  # fmt: skip
    text = (
        "The same for each routed layer (from 0), at the longest length. First: the share in the "
        "document's first block. Chosen, best and random: in the other blocks alone. Open: the "
        "mean number of blocks read per query and key head."
    )
    header = ["layer", "length", "of all attention", "first", "chosen", "best", "random", "open"]
    return Table("Recall of the choice by layer", text, header, rows)


def _retrieval_table(reports: list[Report]) -> Table:
    rows = []
    for report in reports:
        for name, title in (("passkey", "passkey"), ("niah", "needle")):
            for length, accuracy in mean_by_length(report, name).items():
                cells = [cell for cell in getattr(report, name) if cell.length == length]
                worst = min(cells, key=lambda cell: cell.accuracy)
                rows.append(
                    [
                        label(report), title, f"{length:,}", f"{accuracy:.1%}",
                        f"{worst.accuracy:.0%} at depth {worst.depth:.0%}",
                        f"{sum(cell.num_samples for cell in cells):,}",
                    ]
                )  # fmt: skip
    text = "Greedy answers; an answer is right if it contains the hidden number."
    header = ["task", "length", "accuracy", "worst", "prompts"]
    return Table("Passkey and needle in a haystack", text, header, rows,
                 ("passkey", "niah"))  # fmt: skip


def _needle_blocks_table(reports: list[Report]) -> Table:
    rows = [
        [
            label(report), {"niah": "needle"}.get(r.task, r.task), f"{r.length:,}", f"{r.layer}",
            *(_NONE if share is None else f"{share:.0%}" for share in (r.answered, r.failed)),
        ]
        for report in reports
        for r in report.needle_blocks
        if r.length == max(other.length for other in report.needle_blocks)
    ]  # fmt: skip
    text = (
        "How much of the hidden number was in the window or in open blocks while the answer was "
        "generated, for each routed layer at the longest length; the mean over key heads and "
        "prompts."
    )
    header = ["task", "length", "layer", "prompts answered", "prompts failed"]
    return Table("Were the needle's blocks open?", text, header, rows)


def _ruler_table(reports: list[Report]) -> Table:
    lengths = sorted({score.length for report in reports for score in report.ruler})
    rows = []
    for report in reports:
        scores = {(s.task, s.length): s.score for s in report.ruler}
        tasks = sorted({score.task for score in report.ruler}, key=RULER_TASKS.index)
        for task in tasks:
            cells = [scores.get((task, length)) for length in lengths]
            texts = [_NONE if score is None else f"{100 * score:.1f}" for score in cells]
            rows.append([label(report), task, *texts])
        if tasks:
            means = []
            for length in lengths:
                these = [score for (_, n), score in scores.items() if n == length]
                means.append(f"{100 * sum(these) / len(these):.1f}" if these else _NONE)
            rows.append([label(report), "mean", *means])
    header = ["task", *(f"{length:,}" for length in lengths)]
    versions = {score.version or "an older, unknown version" for r in reports for score in r.ruler}
    text = f"Prompts and scoring of {' and of '.join(sorted(versions))}. "
    if len(versions) > 1:
        text += "Scores of different prompts are not comparable. "
    text += "Scores are from 0 to 100; the mean is over the measured tasks."
    return Table("RULER", text, header, rows, ("ruler",))


def _cost_table(reports: list[Report]) -> Table:
    rows = [
        [
            label(report), cost.what, f"{cost.length:,}", f"{cost.seconds:.1f}",
            _NONE if cost.memory_gib is None else f"{cost.memory_gib:.1f}",
        ]
        for report in reports
        for cost in report.costs
    ]  # fmt: skip
    text = "Wall-clock time on the devices named above"
    if any(cost.memory_gib is not None for report in reports for cost in report.costs):
        text += "; peak GPU memory, including weights"
    text += "."
    header = ["task", "length", "seconds", "GiB"]
    return Table("Time and memory", text, header, rows)


def mean_by_length(report: Report, name: str) -> dict[int, float]:
    by_length: dict[int, list[float]] = {}
    for cell in getattr(report, name):
        by_length.setdefault(cell.length, []).append(cell.accuracy)
    return {length: sum(found) / len(found) for length, found in sorted(by_length.items())}


def _interval(low: float | None, high: float | None, form: str) -> str:
    return _NONE if low is None or high is None else f"{low:{form}} - {high:{form}}"


def _with_interval(mean: Mean, form: str) -> str:
    interval = "" if mean.low is None else f" ({_interval(mean.low, mean.high, form)})"
    return f"{mean.mean:{form}}{interval}"
