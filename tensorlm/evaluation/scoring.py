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
    """scores: [tasks, prompts], NaN in the rows of tasks that are too long for the length."""

    scores: NDArray[np.float64]
    too_long: list[Task]
    examples: list[Example]


def score_tasks(
    model: EvaluatedModel, tasks: list[Task], length: int, num_prompts: int, seed: int, title: str
) -> Scores:
    """Let the model answer `num_prompts` prompts of each task in contexts of `length` tokens.

    The examples are those of this rank.

    Raises:
        DoesNotFitError: there is too little memory.
    """
    units = [fit_units(task, seed, length, model.encode) for task in tasks]
    fitting = [t for t in range(len(tasks)) if units[t] is not None]
    jobs = [(t, index) for t in fitting for index in range(num_prompts)]
    if not jobs:
        return Scores(np.full((len(tasks), num_prompts), np.nan), tasks, [])
    mine = jobs[model.grid.rank :: model.grid.world_size]
    examples: list[Example] = []

    def measure() -> NDArray[np.float64]:
        scores = np.zeros((len(tasks), num_prompts))
        with progress(len(mine), "prompt", title, model.grid) as bar:
            for t, index in mine:
                example = _answer(model, tasks[t], units[t], length, index, seed)
                scores[t, index] = example.score
                if index < _EXAMPLES:
                    examples.append(example)
                bar.update()
        return scores

    scores = compute_and_sum(measure, model.device)
    too_long = [task for task, most in zip(tasks, units, strict=True) if most is None]
    scores[[most is None for most in units]] = np.nan
    return Scores(scores, too_long, examples)


def _answer(
    model: EvaluatedModel, task: Task, units: int | None, length: int, index: int, seed: int
) -> Example:
    assert units is not None
    prompt, ids, _ = fit_prompt(task, seed, length, index, units, model.encode)
    prediction = model.generate(ids, task.new_tokens)
    return Example(
        task=task.name,
        length=length,
        answers=prompt.answers,
        prediction=prediction,
        score=task.score(prompt.answers, prediction),
    )
