"""Joining the reports of several evaluations, from their report.json files.

The lengths and tasks of one model become one report; several models are shown side by side.
"""

from pathlib import Path
from typing import Any

from tensorlm.runtime.errors import UserError

from .output import check_output
from .report import format_report, write_reports
from .results import LengthResult, Mean, Ratio, Report, read_report, without_base


def compare_reports(folders: list[Path], output: Path) -> str:
    """Join the reports below `folders`, and write the joint report to `output`.

    An earlier joint report in `output` is never one of the parts.

    Returns:
        All tables and notes, as text.

    Raises:
        UserError: `output` cannot be written or contains one of the parts, there is no report, or
            a report is damaged.
    """
    check_output(output)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--compare: must be folders, got {folder}")
    files = {
        file.resolve(): None for folder in folders for file in sorted(folder.rglob("report.json"))
    }
    parts: list[Report] = []
    for file in files:
        report = read_report(file)
        if file.parent != output.resolve():
            parts.append(report)
        elif not report.is_joined:
            raise UserError(
                f"--output: must not contain a report to compare, which would be replaced, got "
                f"{output} (choose another folder)"
            )
    if not parts:
        raise UserError(
            f"--compare: must contain report.json, got none below {', '.join(map(str, folders))}"
        )
    reports = [report.model_copy(update={"is_joined": True}) for report in merge_reports(parts)]
    write_reports(output, reports)
    notes = [note for report in reports for note in report.notes]
    return "\n".join([format_report(reports), *notes])


def merge_reports(reports: list[Report]) -> list[Report]:
    """Join reports of the same model with different lengths or tasks; others stay separate.

    A model is identified by name, step and digest of weights. Reports of random weights always stay
    separate, since each measures time and memory with its own settings. If two reports have the
    same length of the same task, the later one in the list counts.
    """
    groups: list[list[Report]] = []
    for report in reports:
        group = next((g for g in groups if all(_is_same_model(r, report) for r in g)), None)
        if group:
            group.append(report)
        else:
            groups.append([report])
    return [_join(group) if len(group) > 1 else group[0] for group in groups]


def _is_same_model(first: Report, second: Report) -> bool:
    if (first.name, first.step) != (second.name, second.step) or first.is_random:
        return False
    return first.weights == second.weights or not (first.weights and second.weights)


_KEYS: dict[str, Any] = {
    "perplexity": lambda r: r.length,
    "attribution": lambda r: r.length,
    "recall": lambda r: (r.length, r.layer),
    "passkey": lambda r: (r.length, r.depth),
    "niah": lambda r: (r.length, r.depth),
    "needle_blocks": lambda r: (r.task, r.length, r.layer),
    "ruler": lambda r: (r.task, r.length),
    "costs": lambda r: (r.what, r.length),
}


def _join(parts: list[Report]) -> Report:
    """Join the parts of one model; where facts differ, those of the last part count."""
    lists: dict[str, Any] = {}
    for name, key in _KEYS.items():
        entries = {key(entry): entry for part in parts for entry in getattr(part, name)}
        lists[name] = [entries[k] for k in sorted(entries)]
    for name in ("examples", "notes", "problems"):
        every = [entry for part in parts for entry in getattr(part, name)]
        lists[name] = [entry for i, entry in enumerate(every) if entry not in every[:i]]
    lists["facts"] = _join_facts([part.facts for part in parts])
    lists["is_joined"] = True
    lists["weights"] = next((part.weights for part in parts if part.weights), "")
    joined = parts[-1].model_copy(update=lists)
    ratios, notes = _join_ratios(joined, parts)
    # A length that is missing in one part may be in another.
    earlier = [note for note in joined.notes if note != without_base(joined.trained_length)]
    return joined.model_copy(update={"ratios": ratios, "notes": [*earlier, *notes]})


def _join_facts(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The last part's facts, with all commands and the sum of the seconds of all parts."""
    facts = {key: value for part in parts for key, value in part.items()}
    commands = [command for part in parts for command in part.get("commands", [])]
    if commands:
        facts["commands"] = list(dict.fromkeys(commands))
    if "seconds" in facts:
        facts["seconds"] = round(sum(part.get("seconds", 0.0) for part in parts), 1)
    return facts


def _join_ratios(joined: Report, parts: list[Report]) -> tuple[list[Ratio], list[str]]:
    """Ratios of the results in `joined` to the trained length, and a note for each missing one.

    If `joined` has both results of a part's ratio, that ratio is used, with its interval. Otherwise
    two results have a ratio only if they predicted the same tokens.
    """
    trained = joined.trained_length
    results = {result.length: result for result in joined.perplexity}
    longer = [result for length, result in results.items() if length > trained]
    base = results.get(trained)
    if longer and base is None:
        return [], [without_base(trained)]
    ratios, notes = [], []
    for found in longer:
        assert base
        measured = [r for part in parts for r in _own_ratios(part, base, found)]
        if measured:
            ratios.append(measured[-1])
        elif found.predicted and found.predicted == base.predicted:
            mean = Mean(mean=found.perplexity / base.perplexity)
            multiple = found.length / trained
            ratios.append(Ratio(length=found.length, multiple=multiple, ratio=mean))
        else:
            notes.append(_why_no_ratio(base, found))
    return ratios, notes


def _own_ratios(part: Report, base: LengthResult, found: LengthResult) -> list[Ratio]:
    """The ratio of these two results, if `part` itself has measured it."""
    if base not in part.perplexity or found not in part.perplexity:
        return []
    return [ratio for ratio in part.ratios if ratio.length == found.length]


def _why_no_ratio(base: LengthResult, found: LengthResult) -> str:
    lengths = f"no ratio of perplexity at {found.length:,} to that at {base.length:,} tokens"
    if not (base.predicted and found.predicted):
        return f"{lengths}: an older report does not say which tokens it predicted (repeat it)"
    return (
        f"{lengths}: they predicted different tokens (evaluate both lengths in one call, or with "
        "the same eval.text, eval.max_tokens and eval.segment)"
    )
