"""What an evaluation found: the contents of report.json.

Losses are in nats per token, scores and accuracies from 0 to 1, times in seconds. An interval
(`low`, `high`) holds 95 % of the bootstrap over documents; both are None with one document.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tensorlm.errors import UserError


class Result(BaseModel):
    """Base of all results: frozen; NaN survives JSON as a string."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Mean(Result):
    """A mean over tokens and its interval."""

    mean: float
    low: float | None = None
    high: float | None = None


class Bucket(Result):
    """Mean loss of the tokens at positions start <= p < stop of their window."""

    start: int
    stop: int
    loss: Mean


class LengthResult(Result):
    """Perplexity with windows of `length` tokens."""

    length: int
    loss: float
    perplexity: float
    low: float | None
    high: float | None  # interval of the perplexity
    sliding_perplexity: float | None
    num_tokens: int
    num_documents: int
    buckets: list[Bucket]


class Ratio(Result):
    """Perplexity at `length` over that at the trained length, on the same tokens."""

    length: int
    multiple: float
    ratio: Mean


class Gain(Result):
    """What the context beyond `near` tokens buys at positions start <= p < stop.

    `gain` = loss with the last `near` tokens only - loss with the whole context, same tokens.
    """

    start: int
    stop: int
    near_loss: float
    full_loss: float
    gain: Mean


class Attribution(Result):
    """Gains by position in windows of `length` tokens; `total` over all positions from `near`."""

    length: int
    near: int
    total: Gain
    buckets: list[Gain]


class Cell(Result):
    """One cell of a heat map: needles at `depth` (0: start, 1: end) of `length` tokens."""

    length: int
    depth: float
    accuracy: float
    num_samples: int


class TaskScore(Result):
    """Mean score of one RULER task at one length."""

    task: str
    length: int
    score: float
    num_samples: int


class Cost(Result):
    """What one kind of measurement took at one length; GPU memory at its peak (CPU: None)."""

    what: str
    length: int
    seconds: float
    memory_gib: float | None


class Example(Result):
    """One prompt's answers and what the model wrote."""

    task: str
    length: int
    answers: list[str]
    prediction: str
    score: float


class Report(Result):
    """One evaluation of one model."""

    name: str  # with `step` it tells models apart: the path of a run or folder
    step: int | None = None
    trained_length: int
    facts: dict[str, Any] = {}
    perplexity: list[LengthResult] = []
    ratios: list[Ratio] = []
    attribution: list[Attribution] = []
    passkey: list[Cell] = []
    niah: list[Cell] = []
    ruler: list[TaskScore] = []
    costs: list[Cost] = []
    examples: list[Example] = []
    notes: list[str] = []
    problems: list[str] = []  # lengths that were asked for and needed too much memory

    def write(self, folder: Path) -> None:
        """Write `folder/report.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(self.model_dump_json(indent=1) + "\n")


def read_report(path: Path) -> Report:
    """Read a report.json.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: not a report ({where}: {first['msg']})") from None


def merge_reports(reports: list[Report]) -> list[Report]:
    """Join the reports of one model that hold different lengths or tasks; others stay apart.

    Where two hold the same length (of the same task), the later one in the list counts.
    """
    merged: dict[tuple[str, int | None], Report] = {}
    for report in reports:
        key = (report.name, report.step)
        merged[key] = _join(merged[key], report) if key in merged else report
    return list(merged.values())


def with_short_names(reports: list[Report]) -> list[Report]:
    """For people to read: of each name the last parts of the path, as few as tell models apart."""
    names = {report.name for report in reports}

    def tail(name: str, num_parts: int) -> str:
        return str(Path(*Path(name).parts[-num_parts:]))

    def short(name: str) -> str:
        for num_parts in range(1, len(Path(name).parts)):
            if tail(name, num_parts) not in {tail(n, num_parts) for n in names - {name}}:
                return tail(name, num_parts)
        return name

    return [report.model_copy(update={"name": short(report.name)}) for report in reports]


def _join(first: Report, second: Report) -> Report:
    keys = {
        "perplexity": lambda r: r.length,
        "ratios": lambda r: r.length,
        "attribution": lambda r: r.length,
        "passkey": lambda r: (r.length, r.depth),
        "niah": lambda r: (r.length, r.depth),
        "ruler": lambda r: (r.task, r.length),
        "costs": lambda r: (r.what, r.length),
    }
    lists: dict[str, Any] = {}
    for name, key in keys.items():
        entries = {key(entry): entry for entry in [*getattr(first, name), *getattr(second, name)]}
        lists[name] = [entries[k] for k in sorted(entries)]
    for name in ("examples", "notes", "problems"):
        both = [*getattr(first, name), *getattr(second, name)]
        lists[name] = [entry for i, entry in enumerate(both) if entry not in both[:i]]
    joined = second.model_copy(update=lists)
    return joined.model_copy(update={"ratios": _with_missing_ratios(joined)})


def _with_missing_ratios(report: Report) -> list[Ratio]:
    """Ratios to a trained length that another report measured, on the same tokens: no interval."""
    ratios = {ratio.length: ratio for ratio in report.ratios}
    base = next((r for r in report.perplexity if r.length == report.trained_length), None)
    for found in report.perplexity:
        if base and found.length > base.length and found.num_tokens == base.num_tokens:
            multiple = found.length / base.length
            mean = Mean(mean=found.perplexity / base.perplexity)
            ratios.setdefault(
                found.length, Ratio(length=found.length, multiple=multiple, ratio=mean)
            )
    return [ratios[length] for length in sorted(ratios)]
