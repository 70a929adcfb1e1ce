"""An evaluation from start to end: perplexity, context gain, recall, passkey, needles, RULER."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tensorlm.config.evaluation import GENERATION_TASKS, EvalConfig
from tensorlm.runtime.commit import git_commit

from . import results
from .context_gain import context_gain, near_losses
from .describe import weights_digest
from .limits import Limits
from .model import EvaluatedModel
from .needle_blocks import needle_blocks
from .perplexity import Losses, compare_lengths, measure_length
from .prompts import Task
from .recall import measure_recall
from .retrieval import needle_task, passkey_task
from .ruler import VERSION, ruler_tasks
from .scoring import Scores, score_tasks
from .text import Documents, Prose, choose_spans, make_prose


def evaluate(settings: EvalConfig, model: EvaluatedModel, documents: Documents) -> results.Report:
    """Run the tasks of `settings`; collective, with the same results on all ranks.

    Lengths that need too much memory are skipped and listed in `problems`.

    Raises:
        UserError: the held-out documents are too short for perplexity.
    """
    started = time.perf_counter()
    evaluation = _Evaluation(settings, model)
    found: dict[str, Any] = {}
    if "ppl" in settings.tasks:
        found |= evaluation.perplexity(documents)
    if "recall" in settings.tasks:
        found["recall"] = evaluation.recall(documents)
    if set(settings.tasks) & set(GENERATION_TASKS):
        prose = make_prose(documents, model.tokenizer, max(evaluation.lengths), model.encode)
        if "passkey" in settings.tasks:
            found["passkey"] = evaluation.heat_map("passkey", passkey_task)
        if "niah" in settings.tasks:
            found["niah"] = evaluation.heat_map("niah", lambda depth: needle_task(depth, prose))
        if "ruler" in settings.tasks:
            found["ruler"] = evaluation.ruler(prose)
    is_cuda = model.device.type == "cuda"
    facts = {
        "seconds": round(time.perf_counter() - started, 1),
        "device": torch.cuda.get_device_name(model.device) if is_cuda else "CPU",
        "ranks": model.grid.world_size,
        "sp": model.grid.sp,
        "torch": torch.__version__,
        "commit": git_commit(),
        "settings": settings.model_dump(mode="json"),
        **model.facts,
    }
    return results.Report(
        name=model.name,
        step=model.step,
        trained_length=model.trained_length,
        weights="" if model.gathers_weights else weights_digest(model.network),
        facts=facts,
        needle_blocks=evaluation.needle_blocks,
        examples=evaluation.examples,
        costs=evaluation.limits.costs(),
        notes=[*evaluation.limits.notes(), *evaluation.notes],
        problems=evaluation.limits.problems,
        **found,
    )


class _Evaluation:
    """The parts of one evaluation, and what they share."""

    def __init__(self, settings: EvalConfig, model: EvaluatedModel) -> None:
        self.settings, self.model = settings, model
        self.lengths = sorted(settings.lengths or (model.trained_length,))
        self.limits = Limits(model.device)
        self.examples: list[results.Example] = []
        self.needle_blocks: list[results.NeedleBlocks] = []
        self.notes: list[str] = []

    def perplexity(self, documents: Documents) -> dict[str, Any]:
        """The report's `perplexity`, `ratios` and `attribution`."""
        settings, model = self.settings, self.model
        longest = settings.span_length(self.lengths)
        spans = choose_spans(documents, longest, settings.max_tokens)
        measured: list[results.LengthResult] = []
        tables: dict[int, Losses] = {}
        for length in self.lengths:
            with self.limits.trying("ppl", length):
                result, table = measure_length(model, spans, length, settings.slide, settings.seed)
                measured.append(result)
                tables[length] = table
        owner, near, seed = spans.document, settings.near, settings.seed
        gains = []
        longer = [length for length in tables if 0 < near < length]
        if longer:
            with self.limits.trying("attribution", near):
                table = near_losses(model, spans, near)
                gains = [context_gain(table, tables[n], owner, n, near, seed) for n in longer]
        ratios = compare_lengths(tables, owner, model.trained_length, seed)
        if not ratios and any(length > model.trained_length for length in tables):
            self.notes.append(results.without_base(model.trained_length))
        return {"perplexity": measured, "ratios": ratios, "attribution": gains}

    def recall(self, documents: Documents) -> list[results.Recall]:
        """Recall of the choice of each routed layer, at each length beyond the window."""
        settings, model, found = self.settings, self.model, list[results.Recall]()
        if not model.routed_layers:
            self.notes.append("recall was not measured: the model has no routed layers")
            return found
        longest, window = max(self.lengths), model.shape.window_size
        spans = choose_spans(documents, longest, settings.recall_windows * longest)
        for length in self.lengths:
            if length <= window:
                self.notes.append(
                    f"recall at {length:,} tokens was not measured: no token is beyond the window "
                    f"of {window:,}"
                )
                continue
            with self.limits.trying("recall", length):
                found += measure_recall(model, spans, length, settings.recall_queries)
        return found

    def heat_map(self, name: str, make_task: Callable[[float], Task]) -> list[results.Cell]:
        """Accuracy of `make_task(depth)` by length and depth."""
        num = self.settings.depths
        depths = [depth / (num - 1) for depth in range(num)] if num > 1 else [0.5]
        tasks = [make_task(depth) for depth in depths]
        cells = []
        for length in self.lengths:
            found = self._score(name, name, tasks, length, self.settings.repeats, True)
            if found is not None:
                answered = found.fits & (found.scores == 1)
                self.needle_blocks += needle_blocks(
                    name, length, self.model.routed_layers, found.opened, answered,
                    found.fits & ~answered,
                )  # fmt: skip
                means = [found.mean(task) for task in range(len(depths))]
                cells += [
                    results.Cell(length=length, depth=depth, accuracy=accuracy, num_samples=count)
                    for depth, (accuracy, count) in zip(depths, means, strict=True)
                    if count
                ]
        return cells

    def ruler(self, prose: Prose) -> list[results.TaskScore]:
        """Mean scores of the selected RULER tasks."""
        qa_files, num = [Path(file) for file in self.settings.qa], self.settings.samples
        scores = []
        for length in self.lengths:
            for task in ruler_tasks(length, prose, qa_files, self.model.encode):
                if self.settings.ruler and task.name not in self.settings.ruler:
                    continue
                found = self._score("ruler", task.name, [task], length, num)
                if found is not None:
                    mean, count = found.mean(0)
                    scores.append(
                        results.TaskScore(
                            task=task.name, length=length, score=mean, num_samples=count,
                            version=VERSION,
                        )
                    )  # fmt: skip
        return scores

    def _score(
        self,
        part: str,
        name: str,
        tasks: list[Task],
        length: int,
        num_prompts: int,
        hide_needles: bool = False,
    ) -> Scores | None:
        """Scores, or None if prompts do not fit into the length or memory ran out."""
        found = None
        with self.limits.trying(part, length):
            title = f"{name:>15} {length:>7,}"
            found = score_tasks(
                self.model, tasks, length, num_prompts, self.settings.seed, title, hide_needles
            )
            if found is None:
                self.limits.too_short(length, name)
            else:
                self.limits.left_out(length, name, found.num_left_out, found.fits.size)
                self.examples += found.examples
        return found
