"""Names of models in a report: as short as possible, and unique."""

from pathlib import Path

from .results import Report


def label(report: Report) -> str:
    """The name of a report's model in legends and tables."""
    return report.name if report.step is None else f"{report.name} step {report.step}"


def with_short_names(reports: list[Report]) -> list[Report]:
    """Shorten the names of reports to the fewest last parts of their paths that are unique.

    Reports with the same name and step (random weights, an overwritten folder) are distinguished by
    their output folders, or else by numbers.
    """
    names = {report.name for report in reports}
    short = [_short(report, names - {report.name}) for report in reports]
    keys = [(name, report.step) for name, report in zip(short, reports, strict=True)]
    result = []
    for i, report in enumerate(reports):
        twins = [j for j, key in enumerate(keys) if key == keys[i]]
        name = short[i]
        if len(twins) > 1:
            outputs = [str(reports[j].facts.get("output", "")) for j in twins]
            name = f"{name} ({_distinction(outputs, twins.index(i))})"
        facts = {**report.facts, "path": report.name}
        result.append(report.model_copy(update={"name": name, "facts": facts}))
    return result


def _short(report: Report, others: set[str]) -> str:
    # A report that describes its model has at least two parts: `demo/train`, not `train`.
    fewest = 2 if "parameters" in report.facts else 1
    for num_parts in range(fewest, len(Path(report.name).parts)):
        if _tail(report.name, num_parts) not in {_tail(name, num_parts) for name in others}:
            return _tail(report.name, num_parts)
    return report.name


def _tail(path: str, num_parts: int) -> str:
    return str(Path(*Path(path).parts[-num_parts:]))


def _distinction(outputs: list[str], index: int) -> str:
    if all(outputs) and len(set(outputs)) == len(outputs):
        for num_parts in range(1, max(len(Path(output).parts) for output in outputs)):
            tails = [_tail(output, num_parts) for output in outputs]
            if len(set(tails)) == len(tails):
                return tails[index]
    return f"#{index + 1}"
