"""One evaluation, in order: perplexity, attribution, passkey, needles, RULER."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tensorlm.metrics import git_commit

from .attribution import attribute, near_losses
from .limits import Limits
from .model import EvaluatedModel
from .perplexity import Losses, compare_lengths, measure_length
from .prompts import Task
from .results import Attribution, Cell, Example, LengthResult, Ratio, Report, TaskScore
from .retrieval import needle_task, passkey_task
from .ruler import ruler_tasks
from .scoring import score_tasks
from .settings import EvalConfig
from .text import Documents, Prose, choose_spans, make_prose


def evaluate(settings: EvalConfig, model: EvaluatedModel, documents: Documents) -> Report:
    """Measure what `settings` asks for; all ranks call it together and get the same numbers.

    Lengths that need too much memory are left out and named in `problems`.

    Raises:
        UserError: the held-out documents are too short for perplexity.
    """
    started = time.perf_counter()
    lengths = sorted(settings.lengths or (model.trained_length,))
    limits = Limits(model.device)
    found: dict[str, Any] = {"examples": []}
    if "ppl" in settings.tasks:
        found |= _perplexity(settings, model, documents, lengths, limits)
    if set(settings.tasks) - {"ppl"}:
        prose = make_prose(documents, model.tokenizer, max(lengths))
        for name in ("passkey", "niah"):
            if name in settings.tasks:
                found[name], examples = _heat_map(name, settings, model, lengths, prose, limits)
                found["examples"] += examples
        if "ruler" in settings.tasks:
            found["ruler"], examples = _ruler(settings, model, lengths, prose, limits)
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
        problems=limits.problems,
        notes=limits.notes(),
        costs=limits.costs(),
        **found,
    )


def _perplexity(
    settings: EvalConfig,
    model: EvaluatedModel,
    documents: Documents,
    lengths: list[int],
    limits: Limits,
) -> dict[str, Any]:
    spans = choose_spans(documents, settings.segment or max(lengths), settings.max_tokens)
    results: list[LengthResult] = []
    tables: dict[int, Losses] = {}
    for length in lengths:
        with limits.trying("ppl", length):
            result, table = measure_length(model, spans, length, settings.slide, settings.seed)
            results.append(result)
            tables[length] = table
    seed, owner = settings.seed, spans.document
    ratios: list[Ratio] = compare_lengths(tables, owner, model.trained_length, seed)
    gains: list[Attribution] = []
    longer = [length for length in tables if 0 < settings.near < length]
    if longer:
        with limits.trying("attribution", settings.near):
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
    limits: Limits,
) -> tuple[list[Cell], list[Example]]:
    depths = np.linspace(0, 1, settings.depths).tolist() if settings.depths > 1 else [0.5]
    make: Callable[[float], Task] = (
        passkey_task if name == "passkey" else lambda depth: needle_task(depth, prose)
    )
    cells: list[Cell] = []
    examples: list[Example] = []
    for length in lengths:
        with limits.trying(name, length):
            tasks = [make(depth) for depth in depths]
            found = score_tasks(
                model, tasks, length, settings.repeats, settings.seed, f"{name} {length:>7,}"
            )
            examples += found.examples
            if len(found.too_long) == len(tasks):
                limits.too_short(length, name)
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
    limits: Limits,
) -> tuple[list[TaskScore], list[Example]]:
    qa_files = [Path(file) for file in settings.qa]
    scores: list[TaskScore] = []
    examples: list[Example] = []
    for length in lengths:
        for task in ruler_tasks(length, prose, qa_files, model.encode):
            if settings.ruler and task.name not in settings.ruler:
                continue
            with limits.trying("ruler", length):
                found = score_tasks(
                    model, [task], length, settings.samples, settings.seed,
                    f"{task.name:>15} {length:>7,}",
                )  # fmt: skip
                if found.too_long:
                    limits.too_short(length, task.name)
                    continue
                examples += found.examples
                scores.append(
                    TaskScore(
                        task=task.name,
                        length=length,
                        score=float(found.scores.mean()),
                        num_samples=settings.samples,
                    )
                )
    return scores, examples


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
