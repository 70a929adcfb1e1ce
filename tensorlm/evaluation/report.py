"""What an evaluation leaves behind: report.json, .md and .html, plots, TensorBoard, a table."""

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from .plots import FIGURES, figures, label
from .results import Mean, Report, with_short_names
from .settings import RULER_TASKS


@dataclass(frozen=True)
class Table:
    """One section of a report: what it is, its numbers, and the figures above them."""

    title: str
    text: str
    header: list[str]
    rows: list[list[str]]
    figures: tuple[str, ...] = ()


def write_reports(folder: Path, reports: list[Report]) -> None:
    """Write report.md, report.html and the plots; report.json too where there is one report.

    They replace those of an earlier report in that folder, whose other plots are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    has_earlier = (folder / "report.md").exists()
    if len(reports) == 1:
        reports[0].write(folder)
    reports = with_short_names(reports)
    images = {name: _png(figure) for name, figure in figures(reports).items()}
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(image)
    for name in set(FIGURES) - images.keys() if has_earlier else ():
        (folder / f"{name}.png").unlink(missing_ok=True)
    tables = make_tables(reports)
    (folder / "report.md").write_text(_markdown(reports, tables, images))
    (folder / "report.html").write_text(_html(reports, tables, images))


def log_to_tensorboard(writer: SummaryWriter, report: Report, step: int) -> None:
    """Scalars `eval/...` and the figures, at `step`."""
    for result in report.perplexity:
        writer.add_scalar(f"eval/ppl/{result.length}", result.perplexity, step)
        if result.sliding_perplexity is not None:
            writer.add_scalar(f"eval/ppl_sliding/{result.length}", result.sliding_perplexity, step)
    for ratio in report.ratios:
        writer.add_scalar(f"eval/ppl_ratio/{ratio.length}", ratio.ratio.mean, step)
    for gains in report.attribution:
        writer.add_scalar(f"eval/gain/{gains.length}", gains.total.gain.mean, step)
    for name in ("passkey", "niah"):
        for length, accuracy in _mean_by_length(report, name).items():
            writer.add_scalar(f"eval/{name}/{length}", accuracy, step)
    for score in report.ruler:
        writer.add_scalar(f"eval/ruler/{score.task}/{score.length}", score.score, step)
    tags = {"niah": "eval/needle"}
    for name, figure in figures(with_short_names([report])).items():
        writer.add_figure(tags.get(name, f"eval/{name}"), figure, step)


def format_report(reports: list[Report]) -> str:
    """All tables for the terminal."""
    parts = []
    for table in make_tables(with_short_names(reports)):
        widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
        lines = [table.title]
        for row in (table.header, *table.rows):
            lines.append("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------ tables


def make_tables(reports: list[Report]) -> list[Table]:
    """The numbers of one or several reports; with several, the first column names them."""
    makers = (
        _perplexity_table,
        _ratio_table,
        _attribution_table,
        _retrieval_table,
        _ruler_table,
        _cost_table,
    )
    tables = [make(reports) for make in makers]
    return [table for table in tables if table.rows]


def _named(reports: list[Report], header: list[str]) -> list[str]:
    return ["model", *header] if len(reports) > 1 else header


def _row(reports: list[Report], report: Report, *cells: str) -> list[str]:
    return [label(report), *cells] if len(reports) > 1 else list(cells)


def _perplexity_table(reports: list[Report]) -> Table:
    rows = [
        _row(
            reports, report, f"{r.length:,}", f"{r.length / report.trained_length:.2f}",
            f"{r.loss:.4f}", f"{r.perplexity:.3f}", _interval(r.low, r.high, ".3f"),
            "-" if r.sliding_perplexity is None else f"{r.sliding_perplexity:.3f}",
            f"{r.num_tokens:,}", f"{r.num_documents:,}",
        )
        for report in reports
        for r in report.perplexity
    ]  # fmt: skip
    header = ["length", "x trained", "loss", "perplexity", "95 %", "sliding", "tokens",
              "documents"]  # fmt: skip
    text = (
        "Every length predicts the same held-out tokens, in windows that do not overlap; the "
        "sliding windows give each token more context. Interval: bootstrap over documents."
    )
    return Table("Perplexity by length", text, _named(reports, header), rows,
                 ("perplexity", "positions"))  # fmt: skip


def _ratio_table(reports: list[Report]) -> Table:
    rows = [
        _row(reports, report, f"{r.length:,}", f"{r.multiple:g}", _with_interval(r.ratio, ".4f"))
        for report in reports
        for r in report.ratios
    ]
    text = "Perplexity over that at the trained length; below 1 the longer context helps."
    header = ["length", "x trained", "ratio (95 %)"]
    return Table("Beyond the trained length", text, _named(reports, header), rows)


def _attribution_table(reports: list[Report]) -> Table:
    rows = []
    for report in reports:
        for found in report.attribution:
            totals = [found.total] if len(found.buckets) > 1 else []
            for gain in (*found.buckets, *totals):
                where = f"{gain.start:,} - {gain.stop:,}"
                rows.append(
                    _row(
                        reports, report, f"{found.length:,}", where, f"{found.near:,}",
                        f"{gain.near_loss:.4f}", f"{gain.full_loss:.4f}",
                        _with_interval(gain.gain, "+.4f"),
                    )
                )  # fmt: skip
    text = (
        "The same tokens, predicted from the last tokens only and from the whole window. A model "
        "that ignores what lies further back gains nothing."
    )
    header = ["length", "positions", "last", "loss, last only", "loss, whole", "gain (95 %)"]
    return Table("What long context buys", text, _named(reports, header), rows, ("attribution",))


def _retrieval_table(reports: list[Report]) -> Table:
    rows = []
    for report in reports:
        for name, title in (("passkey", "passkey"), ("niah", "needle")):
            for length, accuracy in _mean_by_length(report, name).items():
                cells = [cell for cell in getattr(report, name) if cell.length == length]
                worst = min(cells, key=lambda cell: cell.accuracy)
                rows.append(
                    _row(
                        reports, report, title, f"{length:,}", f"{accuracy:.1%}",
                        f"{worst.accuracy:.0%} at depth {worst.depth:.0%}",
                        f"{sum(cell.num_samples for cell in cells):,}",
                    )
                )  # fmt: skip
    text = "Greedy answers; right when the hidden number is in them."
    header = ["task", "length", "accuracy", "worst", "prompts"]
    return Table("Passkey and needle in a haystack", text, _named(reports, header), rows,
                 ("passkey", "niah"))  # fmt: skip


def _ruler_table(reports: list[Report]) -> Table:
    lengths = sorted({score.length for report in reports for score in report.ruler})
    rows = []
    for report in reports:
        scores = {(s.task, s.length): s.score for s in report.ruler}
        tasks = sorted({score.task for score in report.ruler}, key=RULER_TASKS.index)
        for task in tasks:
            cells = [scores.get((task, length)) for length in lengths]
            texts = ["-" if score is None else f"{100 * score:.1f}" for score in cells]
            rows.append(_row(reports, report, task, *texts))
        if tasks:
            means = []
            for length in lengths:
                these = [score for (_, n), score in scores.items() if n == length]
                means.append(f"{100 * sum(these) / len(these):.1f}" if these else "-")
            rows.append(_row(reports, report, "mean", *means))
    header = ["task", *(f"{length:,}" for length in lengths)]
    text = "Scores from 0 to 100; the mean is over the tasks that were measured."
    return Table("RULER", text, _named(reports, header), rows, ("ruler",))


def _cost_table(reports: list[Report]) -> Table:
    rows = [
        _row(
            reports, report, cost.what, f"{cost.length:,}", f"{cost.seconds:.1f}",
            "-" if cost.memory_gib is None else f"{cost.memory_gib:.1f}",
        )
        for report in reports
        for cost in report.costs
    ]  # fmt: skip
    text = "Wall-clock time on the devices named above; GPU memory at its peak, weights included."
    header = ["task", "length", "seconds", "GiB"]
    return Table("Time and memory", text, _named(reports, header), rows)


def _mean_by_length(report: Report, name: str) -> dict[int, float]:
    by_length: dict[int, list[float]] = {}
    for cell in getattr(report, name):
        by_length.setdefault(cell.length, []).append(cell.accuracy)
    return {length: sum(found) / len(found) for length, found in sorted(by_length.items())}


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "-" if low is None or high is None else f"{low:{form}} - {high:{form}}"


def _with_interval(mean: Mean, form: str) -> str:
    interval = "" if mean.low is None else f" ({_interval(mean.low, mean.high, form)})"
    return f"{mean.mean:{form}}{interval}"


# ------------------------------------------------------------------------------------------- pages


def _title(reports: list[Report]) -> str:
    return "Evaluation of " + ", ".join(label(report) for report in reports)


def _facts(report: Report) -> str:
    facts = [f"trained length {report.trained_length:,}"]
    facts += [f"{key} {value}" for key, value in report.facts.items() if key != "settings"]
    return f"{label(report)}: " + ", ".join(facts)


def _markdown(reports: list[Report], tables: list[Table], images: dict[str, bytes]) -> str:
    lines = [f"# {_title(reports)}", ""]
    lines += [f"* {_facts(report)}" for report in reports]
    lines += [f"* {note}" for report in reports for note in (*report.problems, *report.notes)]
    for table in tables:
        lines += ["", f"## {table.title}", "", table.text, ""]
        for name in table.figures:
            lines += [f"![{name}]({name}.png)", ""] if name in images else []
        lines += [f"| {' | '.join(row)} |" for row in (table.header, ["---:"] * len(table.header))]
        lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join(lines) + "\n"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
img { max-width: 100%; } pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem; }
"""


def _html(reports: list[Report], tables: list[Table], images: dict[str, bytes]) -> str:
    escape = html.escape
    title = escape(_title(reports))
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><ul>",
        *(f"<li>{escape(_facts(report))}</li>" for report in reports),
        *(f"<li>{escape(n)}</li>" for report in reports for n in (*report.problems, *report.notes)),
        "</ul>",
    ]
    for table in tables:
        parts.append(f"<h2>{escape(table.title)}</h2><p>{escape(table.text)}</p>")
        for name in table.figures:
            if name in images:
                data = base64.b64encode(images[name]).decode()
                parts.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
        rows = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in table.header)}</tr>"]
        for row in table.rows:
            rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
        parts.append(f"<table>{''.join(rows)}</table>")
    parts += [_examples_html(report) for report in reports if report.examples]
    return "\n".join([*parts, "</body></html>", ""])


def _examples_html(report: Report) -> str:
    lines = [
        f"{e.task}, {e.length:,} tokens, score {e.score:g}\n  expected: {', '.join(e.answers)}\n"
        f"  written:  {e.prediction.strip()!r}"
        for e in report.examples
    ]
    title, text = html.escape(f"Some answers of {label(report)}"), html.escape("\n".join(lines))
    return f"<details><summary>{title}</summary><pre>{text}</pre></details>"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
