"""A report as one page: Markdown with separate plots, or HTML with everything included."""

import base64
import html

from .names import label
from .results import Report
from .summary import facts_table, headlines, title
from .tables import Table

_CAPTIONS = {
    "ratio": "Change of perplexity relative to the trained length; band: 95 % interval.",
    "perplexity": "Perplexity by length; its interval is in the table.",
    "positions": "Loss of tokens by position in the window; band: 95 % interval.",
    "attribution": "Loss reduction from the context beyond the last tokens, by position.",
    "recall": "Recall of the choice at the longest length, compared with the best and a random "
    "choice of the same number of blocks.",
    "passkey": "Share of keys found, by length and depth.",
    "niah": "Share of needles found, by length and depth.",
    "ruler": "Mean score of the tasks, by length.",
}


def markdown(reports: list[Report], tables: list[Table], images: dict[str, bytes]) -> str:
    """The report as Markdown; plots are separate files."""
    lines = [f"# {title(reports)}", ""]
    lines += [f"**{sentence}**\n" for sentence in headlines(reports)]
    lines += _markdown_table(facts_table(reports), ":---")
    if remarks := _remarks(reports):
        lines += ["", *(f"* {remark}" for remark in remarks)]
    for table in tables:
        lines += ["", f"## {table.title}", "", table.text, ""]
        for name in table.figures:
            lines += [f"![{name}]({name}.png)", ""] if name in images else []
        lines += _markdown_table(table, "---:")
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table, alignment: str) -> list[str]:
    rows = [table.header, [alignment] * len(table.header), *table.rows]
    return [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]


def _remarks(reports: list[Report]) -> list[str]:
    """Problems and notes of all reports, with the model's name if there are several."""
    return [
        f"{label(report)}: {remark}" if len(reports) > 1 else remark
        for report in reports
        for remark in (*report.problems, *report.notes)
    ]


_WORDS = ("model", "task")  # headers of first columns with text

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; color: #1b1f24; max-width: 54rem;
  margin: 2.5rem auto 4rem; padding: 0 1.2rem; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; padding-top: .9rem; border-top: 1px solid #d8dee4; }
p { margin: .4rem 0 .8rem; }
.lead { font-size: 1.12rem; background: #eef4fb; border-left: 4px solid #1f77b4;
  padding: .7rem 1rem; margin: 0 0 1.2rem; }
.about, figcaption { color: #57606a; font-size: .92rem; }
.remarks { background: #fff8e5; border-left: 4px solid #d4a72c; padding: .6rem 1rem .6rem 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { padding: .28rem .8rem; text-align: right; border-bottom: 1px solid #e4e8ec; }
thead th { border-bottom: 2px solid #8c959f; white-space: nowrap; }
td { white-space: nowrap; }
.named th:first-child, .named td:first-child { text-align: left; }
.facts { width: 100%; font-size: .94rem; }
.facts th, .facts td { text-align: left; vertical-align: top; white-space: normal; }
.facts tbody th { color: #57606a; font-weight: normal; white-space: nowrap; width: 9rem; }
.facts td { overflow-wrap: anywhere; white-space: pre-line; }
figure { margin: 1rem 0 1.4rem; }
img { max-width: 100%; height: auto; }
pre { white-space: pre-wrap; background: #f6f8fa; padding: .8rem; font-size: .86rem; }
summary { cursor: pointer; margin-top: 1.6rem; }
"""


def page(reports: list[Report], tables: list[Table], images: dict[str, bytes]) -> str:
    """The report as HTML, without other files or network access."""
    name = html.escape(title(reports))
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{name}</h1>",
        *(f'<p class="lead">{html.escape(sentence)}</p>' for sentence in headlines(reports)),
        _table(facts_table(reports), "facts"),
    ]
    if remarks := _remarks(reports):
        items = "".join(f"<li>{html.escape(remark)}</li>" for remark in remarks)
        parts.append(f'<ul class="remarks">{items}</ul>')
    for table in tables:
        parts.append(f"<h2>{html.escape(table.title)}</h2>")
        parts.append(f'<p class="about">{html.escape(table.text)}</p>')
        parts += [_figure(name, images[name]) for name in table.figures if name in images]
        parts.append(_table(table, "named" if table.header[0] in _WORDS else "numbers"))
    parts += [_examples(report) for report in reports if report.examples]
    return "\n".join([*parts, "</body></html>", ""])


def _table(table: Table, kind: str) -> str:
    def row(cells: list[str], first: str = "td") -> str:
        marked = [f"<{first}>{html.escape(cells[0])}</{first}>"]
        other = "th" if cells is table.header else "td"
        marked += [f"<{other}>{html.escape(cell)}</{other}>" for cell in cells[1:]]
        return f"<tr>{''.join(marked)}</tr>"

    head = f"<thead>{row(table.header, 'th')}</thead>" if any(table.header) else ""
    first = "th" if kind == "facts" else "td"
    body = "".join(row(cells, first) for cells in table.rows)
    return f'<div class="wide"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def _figure(name: str, image: bytes) -> str:
    data, caption = base64.b64encode(image).decode(), html.escape(_CAPTIONS[name])
    picture = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _examples(report: Report) -> str:
    lines = [
        f"{e.task}, {e.length:,} tokens, score {e.score:g}\n  expected: {', '.join(e.answers)}\n"
        f"  got:      {e.prediction.strip()!r}"
        for e in report.examples
    ]
    name, text = html.escape(f"Example answers of {label(report)}"), html.escape("\n".join(lines))
    return f"<details><summary>{name}</summary><pre>{text}</pre></details>"
