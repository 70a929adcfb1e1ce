"""The outputs of an evaluation: report.json, .md and .html, plots, TensorBoard and a table."""

import io
from pathlib import Path

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from .names import with_short_names
from .page import markdown, page
from .plots import FIGURES, figures
from .recall_summary import recall_lengths, recall_of_all, recall_of_others
from .results import Report
from .summary import headlines
from .tables import make_tables, mean_by_length


def write_reports(folder: Path, reports: list[Report]) -> None:
    """Write report.md, report.html and plots; with a single report, also report.json.

    They replace those of an earlier report in the folder; its other plots are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    has_earlier = (folder / "report.md").exists()
    if len(reports) == 1:
        reports[0].write(folder)
    elif has_earlier:
        (folder / "report.json").unlink(missing_ok=True)
    reports = with_short_names(reports)
    images = {name: _png(figure) for name, figure in figures(reports).items()}
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(image)
    for name in set(FIGURES) - images.keys() if has_earlier else ():
        (folder / f"{name}.png").unlink(missing_ok=True)
    tables = make_tables(reports)
    (folder / "report.md").write_text(markdown(reports, tables, images))
    (folder / "report.html").write_text(page(reports, tables, images))


def log_to_tensorboard(writer: SummaryWriter, report: Report, step: int) -> None:
    """Log scalars `eval/...` and the figures at `step`."""
    for result in report.perplexity:
        writer.add_scalar(f"eval/ppl/{result.length}", result.perplexity, step)
        if result.sliding_perplexity is not None:
            writer.add_scalar(f"eval/ppl_sliding/{result.length}", result.sliding_perplexity, step)
    for ratio in report.ratios:
        writer.add_scalar(f"eval/ppl_ratio/{ratio.length}", ratio.ratio.mean, step)
    for gains in report.attribution:
        writer.add_scalar(f"eval/gain/{gains.length}", gains.total.gain.mean, step)
    for length in recall_lengths(report):
        for found, part in (
            (recall_of_all(report, length), ""),
            (recall_of_others(report, length), "_without_first"),
        ):
            for name in ("chosen", "best", "random"):
                kind = "" if name == "chosen" else f"_{name}"
                tag = f"eval/recall{kind}{part}/{length}"
                writer.add_scalar(tag, getattr(found, name), step)
    for name in ("passkey", "niah"):
        for length, accuracy in mean_by_length(report, name).items():
            writer.add_scalar(f"eval/{name}/{length}", accuracy, step)
    for score in report.ruler:
        writer.add_scalar(f"eval/ruler/{score.task}/{score.length}", score.score, step)
    tags = {"niah": "eval/needle"}
    for name, figure in figures(with_short_names([report])).items():
        writer.add_figure(tags.get(name, f"eval/{name}"), figure, step)


def format_report(reports: list[Report]) -> str:
    """All tables for the terminal, followed by the headline sentences."""
    reports = with_short_names(reports)
    parts = []
    for table in make_tables(reports):
        widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
        lines = [table.title]
        for row in (table.header, *table.rows):
            lines.append("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *headlines(reports)])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
