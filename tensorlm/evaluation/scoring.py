"""Prompts through the model: scores of many prompts, shared among the ranks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .model import EvaluatedModel
from .prompts import Task, fit_prompt, fit_units
from .ranks import compute_and_sum, progress
from .results import Example

_EXAMPLES = 2  # prompts of each task that the report shows


@dataclass(frozen=True)
class Scores:
    """scores: [tasks, prompts], of all ranks; examples: some answers that this rank saw."""

    scores: NDArray[np.float64]
    examples: list[Example]


def score_tasks(
    model: EvaluatedModel, tasks: list[Task], length: int, num_prompts: int, seed: int, title: str
) -> Scores | None:
    """Let the model answer `num_prompts` prompts of each task in contexts of `length` tokens.

    Args:
        model: the model.
        tasks: alike in size: as much filler as fits into a prompt of the first is tried in all.
        length: tokens of a prompt and its answer, at most.
        num_prompts: for each task.
        seed: of the prompts.
        title: for the progress bar.

    Returns:
        None where even the shortest prompt is too long.

    Raises:
        DoesNotFitError: there is too little memory.
    """
    units = fit_units(tasks[0], seed, length, model.encode)
    if units is None:
        return None
    jobs = [(t, index) for t in range(len(tasks)) for index in range(num_prompts)]
    mine = jobs[model.grid.rank :: model.grid.world_size]
    examples: list[Example] = []

    def measure() -> NDArray[np.float64]:
        scores = np.zeros((len(tasks), num_prompts))
        with progress(len(mine), "prompt", title, model.grid) as bar:
            for t, index in mine:
                example = _answer(model, tasks[t], units, length, index, seed)
                scores[t, index] = example.score
                if index < _EXAMPLES:
                    examples.append(example)
                bar.update()
        return scores

    alone = range(model.grid.rank, model.grid.rank + 1)  # prompts are answered by one rank each
    return Scores(compute_and_sum(measure, model.device, alone), examples)


def _answer(
    model: EvaluatedModel, task: Task, units: int, length: int, index: int, seed: int
) -> Example:
    prompt, ids = fit_prompt(task, seed, length, index, units, model.encode)[:2]
    prediction = model.generate(ids, task.new_tokens)
    return Example(
        task=task.name,
        length=length,
        answers=prompt.answers,
        prediction=prediction,
        score=task.score(prompt.answers, prediction),
    )
