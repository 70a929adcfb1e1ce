"""The top of a report: the model, the text, the call, and the main result in one sentence."""

import math
from typing import Any

from tensorlm.runtime.progress import format_duration

from .names import label
from .results import Report
from .tables import Table


def title(reports: list[Report]) -> str:
    """The title: names of all models; of a single model, also its size and attention."""
    names = ", ".join(label(report) for report in reports)
    facts = reports[0].facts
    if len(reports) > 1 or "parameters" not in facts:
        return f"Evaluation of {names}"
    return f"Evaluation of {names}: {_count(facts['parameters'])} parameters, {facts['attention']}"


def headline(report: Report) -> str | None:
    """The effect of the longest context on perplexity, in one sentence; None if not measured."""
    if not report.ratios:
        return None
    last = report.ratios[-1]
    where = (
        f"With {last.multiple:g} times the context of training ({last.length:,} instead of "
        f"{report.trained_length:,} tokens), perplexity is"
    )
    if not math.isfinite(last.ratio.mean):
        return f"{where} not a number."
    change = 100 * (last.ratio.mean - 1)
    word = "higher" if change >= 0 else "lower"
    interval = ""
    if last.ratio.low is not None and last.ratio.high is not None:
        low, high = 100 * (last.ratio.low - 1), 100 * (last.ratio.high - 1)
        interval = f" (95 % interval: {low:+.2f} % to {high:+.2f} %)"
    found = next((r for r in report.perplexity if r.length == last.length), None)
    tokens = f"same {found.num_tokens:,} held-out tokens" if found else "same held-out tokens"
    return f"{where} {abs(change):.2f} % {word}{interval}, on the {tokens}."


def headlines(reports: list[Report]) -> list[str]:
    """The headline of each report that has one, with the model's name if there are several."""
    sentences = [(report, sentence) for report in reports if (sentence := headline(report))]
    return [
        f"{label(report)}: {sentence}" if len(reports) > 1 else sentence
        for report, sentence in sentences
    ]


def facts_table(reports: list[Report]) -> Table:
    """A table of the facts, with one column per model."""
    columns = [_facts(report) for report in reports]
    keys = [key for key in columns[0] if any(column[key] for column in columns)]
    rows = [[key, *(column[key] or "unknown" for column in columns)] for key in keys]
    header = ["", *(label(report) if len(reports) > 1 else "" for report in reports)]
    return Table("", "", header, rows)


def _facts(report: Report) -> dict[str, str]:
    """The facts as text; empty if unknown."""
    facts = report.facts
    parameters = facts.get("parameters")
    ranks, sp = facts.get("ranks", 1), facts.get("sp", 1)
    device = str(facts.get("device", ""))
    device = f"{ranks} x {device}" if ranks > 1 else device
    software = [f"torch {facts['torch']}"] if "torch" in facts else []
    software += [f"tensorlm {facts['commit']}"] if "commit" in facts else []
    return {
        "Model": label(report) + (f" ({facts['path']})" if "path" in facts else ""),
        "Parameters": f"{_count(parameters)} ({parameters:,})" if parameters else "",
        "Attention": str(facts.get("attention", "")),
        "Trained": _training(report),
        "Held-out text": _text(report),
        "Date": str(facts.get("date", "")),
        "Device": device + (f", windows shared by {sp}" if sp > 1 else ""),
        "Time": format_duration(facts["seconds"]) if "seconds" in facts else "",
        "Command": "\n".join(facts.get("commands", [])),
        "Software": ", ".join(software),
    }


def _training(report: Report) -> str:
    if report.is_random:
        return "not trained (random weights)"
    length = f"at a length of {report.trained_length:,} tokens"
    tokens = report.facts.get("trained_tokens")
    if tokens == 0:
        return f"not in this run (imported or initial weights), {length}"
    return length if tokens is None else f"on {tokens:,} tokens, {length}"


def _text(report: Report) -> str:
    text = str(report.facts.get("text", ""))
    sizes = {(r.num_tokens, r.num_documents) for r in report.perplexity}
    if len(sizes) == 1:
        ((tokens, documents),) = sizes
        plural = "" if documents == 1 else "s"
        size = f"{tokens:,} tokens of {documents:,} document{plural} predicted"
        text = f"{text}; {size}" if text else size
    return text


def _count(number: Any) -> str:
    """Format with three digits: `1.31 M`, `8.03 B`."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
