"""Prompts through the model: scores of many prompts, shared among the ranks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .model import EvaluatedModel
from .prompts import Task, first_units, fit_prompt
from .ranks import compute_and_sum, progress
from .results import Example

_EXAMPLES = 2  # prompts of each task that the report shows


@dataclass(frozen=True)
class Scores:
    """Scores of all ranks' prompts, and some answers that this rank saw.

    scores: [tasks, prompts], zero where the prompt does not fit; fits: [tasks, prompts] bool.
    """

    scores: NDArray[np.float64]
    fits: NDArray[np.bool_]
    examples: list[Example]

    @property
    def num_left_out(self) -> int:
        """How many prompts do not fit."""
        return int((~self.fits).sum())

    def mean(self, task: int) -> tuple[float, int]:
        """Mean score of a task over the prompts that fit, and their number; (0, 0): none did."""
        count = int(self.fits[task].sum())
        return float(self.scores[task].sum()) / max(1, count), count


def score_tasks(
    model: EvaluatedModel, tasks: list[Task], length: int, num_prompts: int, seed: int, title: str
) -> Scores | None:
    """Let the model answer `num_prompts` prompts of each task in contexts of `length` tokens.

    A prompt that is too long even with the least filler is left out.

    Args:
        model: the model.
        tasks: alike in size: the filler that fits into one prompt of the first is tried in all.
        length: maximum tokens of a prompt and its answer.
        num_prompts: for each task.
        seed: of the prompts.
        title: for the progress bar.

    Returns:
        None where no prompt of the first task fits.

    Raises:
        DoesNotFitError: there is too little memory.
    """
    units = first_units(tasks[0], seed, length, num_prompts, model.encode)
    if units is None:
        return None
    jobs = [(t, index) for t in range(len(tasks)) for index in range(num_prompts)]
    mine = jobs[model.grid.rank :: model.grid.world_size]
    examples: list[Example] = []

    def measure() -> NDArray[np.float64]:
        found = np.zeros((2, len(tasks), num_prompts))  # scores, and which prompts fit
        with progress(len(mine), "prompt", title, model.grid) as bar:
            for t, index in mine:
                example = _answer(model, tasks[t], units, length, index, seed)
                if example:
                    found[:, t, index] = example.score, 1.0
                    if index < _EXAMPLES:
                        examples.append(example)
                bar.update()
        return found

    alone = range(model.grid.rank, model.grid.rank + 1)  # prompts are answered by one rank each
    scores, fits = compute_and_sum(measure, model.device, alone)
    return Scores(scores, fits > 0, examples)


def _answer(
    model: EvaluatedModel, task: Task, units: int, length: int, index: int, seed: int
) -> Example | None:
    """What the model writes after prompt `index`; None where the prompt does not fit."""
    fitted = fit_prompt(task, seed, length, index, units, model.encode)
    if fitted is None:
        return None
    prompt, ids, _ = fitted
    prediction = model.generate(ids, task.new_tokens)
    return Example(
        task=task.name,
        length=length,
        answers=prompt.answers,
        prediction=prediction,
        score=task.score(prompt.answers, prediction),
    )
