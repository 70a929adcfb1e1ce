"""The results of an evaluation: the content of report.json.

Losses are in nats per token, scores and accuracies are from 0 to 1, times are in seconds. An
interval (`low`, `high`) contains 95 % of the bootstrap over documents; both are None with one
document.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tensorlm.config.settings_errors import problem_lines
from tensorlm.runtime.errors import UserError


class Result(BaseModel):
    """Base of all results: frozen; NaN is a string in JSON."""

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
    predicted: str = ""  # sha256 of the spans and their documents; empty in older reports


class Ratio(Result):
    """Perplexity at `length` / perplexity at the trained length, on the same tokens."""

    length: int
    multiple: float
    ratio: Mean


class Gain(Result):
    """Gain from the context beyond `near` tokens, at positions start <= p < stop.

    `gain` = loss with only the last `near` tokens - loss with the whole context, on the same
    tokens.
    """

    start: int
    stop: int
    near_loss: float
    full_loss: float
    gain: Mean


class ContextGain(Result):
    """Gains by position in windows of `length` tokens; `total` over all positions from `near`."""

    length: int
    near: int
    total: Gain
    buckets: list[Gain]


class RecallAt(Result):
    """Recall at distances start <= t - u < stop, without the document's first block.

    Fields as in `Recall`.
    """

    start: int
    stop: int
    mass: float  # of all attention
    chosen: float
    best: float
    random: float


class Recall(Result):
    """The share of one layer's full attention beyond the window that lies in its choice.

    Measured in windows of `length` tokens, over heads and the last `num_queries` tokens of all
    windows.

    Attributes:
        beyond: share of all attention that is beyond the window.
        first: share of that in the document's first block.
        chosen: share in all open blocks.
        best: share in the same number of blocks with the largest mass.
        random: share in the first block and random others, the same number of blocks.
        opened: mean number of open blocks.
    """

    length: int
    layer: int
    num_queries: int
    beyond: float
    first: float
    chosen: float
    best: float
    random: float
    opened: float
    distances: list[RecallAt]


class Cell(Result):
    """One cell of a heat map: needles at `depth` (0: start, 1: end) of `length` tokens."""

    length: int
    depth: float
    accuracy: float
    num_samples: int


class NeedleBlocks(Result):
    """Whether the needle was open to the tokens of the answer, in one routed layer.

    `answered`, `failed`: the fraction of the needle's tokens that were in the window or in an open
    block, the mean over key heads and over the prompts that were answered correctly or not; None
    if there are no such prompts.
    """

    task: str
    length: int
    layer: int
    answered: float | None
    failed: float | None
    num_answered: int
    num_failed: int


class TaskScore(Result):
    """Mean score of one RULER task at one length."""

    task: str
    length: int
    score: float
    num_samples: int
    version: str = ""  # version of the prompts; empty in older reports


class Cost(Result):
    """Cost of one kind of measurement at one length; peak GPU memory (None on CPUs)."""

    what: str
    length: int
    seconds: float
    memory_gib: float | None


class Example(Result):
    """One prompt's answers, and the model's output."""

    task: str
    length: int
    answers: list[str]
    prediction: str
    score: float


RANDOM_WEIGHTS = "random weights"  # last part of an untrained model's name


class Report(Result):
    """One evaluation of one model, or several joined ones.

    `name` (path of a run or folder), `step` and `weights` (a digest of some elements; empty:
    unknown) identify the model. `facts` describe the model and the call.
    """

    name: str
    step: int | None = None
    trained_length: int
    weights: str = ""
    is_joined: bool = False  # made by --compare
    facts: dict[str, Any] = {}
    perplexity: list[LengthResult] = []
    ratios: list[Ratio] = []
    attribution: list[ContextGain] = []
    recall: list[Recall] = []
    passkey: list[Cell] = []
    niah: list[Cell] = []
    needle_blocks: list[NeedleBlocks] = []
    ruler: list[TaskScore] = []
    costs: list[Cost] = []
    examples: list[Example] = []
    notes: list[str] = []
    problems: list[str] = []  # requested lengths that did not fit into memory

    @property
    def is_random(self) -> bool:
        """Whether the weights were random."""
        return self.step is None and Path(self.name).name == RANDOM_WEIGHTS

    def write(self, folder: Path) -> None:
        """Write `folder/report.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(self.model_dump_json(indent=1) + "\n")


def same_tokens(reports: list[Report]) -> bool:
    """Whether all perplexities of these reports are known to predict the same tokens."""
    predicted = {result.predicted for report in reports for result in report.perplexity}
    if predicted == {""}:  # older evaluations predicted the same tokens at all their lengths
        return len(reports) == 1 and not reports[0].is_joined
    return len(predicted) <= 1


def read_report(path: Path) -> Report:
    """Read a report.json.

    Raises:
        UserError: it cannot be read, or is not a report.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        (first, *_) = problem_lines(error, f"{path}: not a report")
        raise UserError(first) from None


def without_base(trained_length: int) -> str:
    """The note of a report without ratios, because the trained length was not measured."""
    return (
        f"no ratios beyond the trained length: perplexity at {trained_length:,} tokens was not "
        "measured (evaluate that length too)"
    )
