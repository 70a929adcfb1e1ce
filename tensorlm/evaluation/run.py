"""One evaluation, in order: perplexity, attribution, passkey, needles, RULER."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tensorlm.metrics import git_commit

from .attribution import attribute, near_losses
from .model import EvaluatedModel
from .perplexity import Losses, compare_lengths, measure_length
from .prompts import Task
from .ranks import DoesNotFitError
from .results import Attribution, Cell, Example, LengthResult, Ratio, Report, TaskScore
from .retrieval import needle_task, passkey_task
from .ruler import ruler_tasks
from .scoring import score_tasks
from .settings import EvalConfig
from .text import Documents, Prose, choose_spans, make_prose


@dataclass
class _Fit:
    """What fits: the longest length that did, and what it needed beyond the weights, in bytes.

    problems: lengths that did not fit; notes: what else a reader must know.
    """

    device: torch.device
    weights: int = 0
    length: int = 0
    needed: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            self.weights = torch.cuda.memory_allocated(self.device)

    @contextmanager
    def trying(self, what: str, length: int) -> Iterator[None]:
        """Note what `length` needs, or that there is too little memory for it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        except DoesNotFitError:
            self.problems.append(
                f"eval.lengths: {what} at {length} tokens does not fit into {self._size()} "
                f"({self._advice(length)})"
            )
        else:
            if self.device.type == "cuda" and length >= self.length:
                self.needed = torch.cuda.max_memory_allocated(self.device) - self.weights
            self.length = max(self.length, length)

    def _size(self) -> str:
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            return f"{properties.name}'s {properties.total_memory / 2**30:.1f} GiB"
        return "memory"

    def _advice(self, length: int) -> str:
        if self.device.type == "cuda" and self.needed > 0:
            total = torch.cuda.get_device_properties(self.device).total_memory
            room = int(0.95 * (total - self.weights) / self.needed * self.length)
            return f"about {max(self.length, min(room, length - 1) // 1024 * 1024)} tokens would"
        return f"{self.length} did" if self.length else f"try {length // 2}"


def evaluate(settings: EvalConfig, model: EvaluatedModel, documents: Documents) -> Report:
    """Measure what `settings` asks for; all ranks call it together and get the same numbers.

    Lengths that need too much memory are left out and named in `problems`.

    Raises:
        UserError: the held-out documents are too short for perplexity.
    """
    started = time.perf_counter()
    lengths = sorted(settings.lengths or (model.trained_length,))
    fit = _Fit(model.device)
    found: dict[str, Any] = {"examples": []}
    if "ppl" in settings.tasks:
        found |= _perplexity(settings, model, documents, lengths, fit)
    if set(settings.tasks) - {"ppl"}:
        prose = make_prose(documents, model.tokenizer, max(lengths))
        for name in ("passkey", "niah"):
            if name in settings.tasks:
                found[name], examples = _heat_map(name, settings, model, lengths, prose, fit)
                found["examples"] += examples
        if "ruler" in settings.tasks:
            found["ruler"], examples = _ruler(settings, model, lengths, prose, fit)
            found["examples"] += examples
    facts = {
        "seconds": round(time.perf_counter() - started, 1),
        "device": _device_name(model.device),
        "ranks": model.grid.world_size,
        "sp": model.grid.sp,
        "torch": torch.__version__,
        "commit": git_commit(),
        "settings": settings.model_dump(mode="json"),
    }
    return Report(
        name=model.name,
        step=model.step,
        trained_length=model.trained_length,
        facts=facts,
        problems=fit.problems,
        notes=fit.notes,
        **found,
    )


def _perplexity(
    settings: EvalConfig,
    model: EvaluatedModel,
    documents: Documents,
    lengths: list[int],
    fit: _Fit,
) -> dict[str, Any]:
    spans = choose_spans(documents, settings.segment or max(lengths), settings.max_tokens)
    results: list[LengthResult] = []
    tables: dict[int, Losses] = {}
    for length in lengths:
        with fit.trying("ppl", length):
            result, table = measure_length(model, spans, length, settings.slide, settings.seed)
            results.append(result)
            tables[length] = table
    seed, owner = settings.seed, spans.document
    ratios: list[Ratio] = compare_lengths(tables, owner, model.trained_length, seed)
    gains: list[Attribution] = []
    longer = [length for length in tables if 0 < settings.near < length]
    if longer:
        with fit.trying("attribution", settings.near):
            near = near_losses(model, spans, settings.near)
            gains = [
                attribute(near, tables[length], owner, length, settings.near, seed)
                for length in longer
            ]
    return {"perplexity": results, "ratios": ratios, "attribution": gains}


def _heat_map(
    name: str,
    settings: EvalConfig,
    model: EvaluatedModel,
    lengths: list[int],
    prose: Prose,
    fit: _Fit,
) -> tuple[list[Cell], list[Example]]:
    depths = np.linspace(0, 1, settings.depths).tolist() if settings.depths > 1 else [0.5]
    make: Callable[[float], Task] = (
        passkey_task if name == "passkey" else lambda depth: needle_task(depth, prose)
    )
    cells: list[Cell] = []
    examples: list[Example] = []
    for length in lengths:
        with fit.trying(name, length):
            tasks = [make(depth) for depth in depths]
            found = score_tasks(
                model, tasks, length, settings.repeats, settings.seed, f"{name} {length:>7,}"
            )
            examples += found.examples
            if len(found.too_long) == len(tasks):
                fit.notes.append(f"{name}: its shortest prompt has more than {length} tokens")
            cells += [
                Cell(length=length, depth=d, accuracy=a, num_samples=settings.repeats)
                for d, a in zip(depths, found.scores.mean(axis=1).tolist(), strict=True)
                if not math.isnan(a)
            ]
    return cells, examples


def _ruler(
    settings: EvalConfig,
    model: EvaluatedModel,
    lengths: list[int],
    prose: Prose,
    fit: _Fit,
) -> tuple[list[TaskScore], list[Example]]:
    qa_files = [Path(file) for file in settings.qa]
    scores: list[TaskScore] = []
    examples: list[Example] = []
    for length in lengths:
        for task in ruler_tasks(length, prose, qa_files, model.encode):
            if settings.ruler and task.name not in settings.ruler:
                continue
            started = time.perf_counter()
            with fit.trying("ruler", length):
                found = score_tasks(
                    model, [task], length, settings.samples, settings.seed,
                    f"{task.name:>15} {length:>7,}",
                )  # fmt: skip
                if found.too_long:
                    fit.notes.append(
                        f"{task.name}: its shortest prompt has more than {length} tokens"
                    )
                    continue
                examples += found.examples
                scores.append(
                    TaskScore(
                        task=task.name,
                        length=length,
                        score=float(found.scores.mean()),
                        num_samples=settings.samples,
                        seconds=time.perf_counter() - started,
                    )
                )
    return scores, examples


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
