"""Prompts through the model: scores of many prompts, shared among the ranks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .model import EvaluatedModel
from .needle_blocks import find_needle, open_shares
from .prompts import Task, first_units, fit_prompt
from .ranks import compute_and_sum, progress
from .results import Example

_EXAMPLES = 2  # prompts of each task that the report shows


@dataclass(frozen=True)
class Scores:
    """Scores of all ranks' prompts, and some answers that this rank saw.

    scores: [tasks, prompts], zero where the prompt does not fit; fits: [tasks, prompts] bool.
    opened: [routed layers, tasks, prompts], how much of the needle was open; no layers unless the
    tasks hide one.
    """

    scores: NDArray[np.float64]
    fits: NDArray[np.bool_]
    opened: NDArray[np.float64]
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
    model: EvaluatedModel,
    tasks: list[Task],
    length: int,
    num_prompts: int,
    seed: int,
    title: str,
    hide_needles: bool = False,
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
        hide_needles: whether each prompt holds its answer, whose place in the choices is of
            interest.

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
    num_layers = len(model.routed_layers) if hide_needles else 0

    def measure() -> NDArray[np.float64]:
        # Scores, which prompts fit, and how much of their needles was open.
        found = np.zeros((2 + num_layers, len(tasks), num_prompts))
        with progress(len(mine), "prompt", title, model.grid) as bar:
            for t, index in mine:
                opened = found[2:, t, index] if num_layers else None
                example = _answer(model, tasks[t], units, length, index, seed, opened)
                if example:
                    found[:2, t, index] = example.score, 1.0
                    if index < _EXAMPLES:
                        examples.append(example)
                bar.update()
        return found

    alone = range(model.grid.rank, model.grid.rank + 1)  # prompts are answered by one rank each
    scores, fits, *opened = compute_and_sum(measure, model.device, alone)
    return Scores(scores, fits > 0, np.array(opened), examples)


def _answer(
    model: EvaluatedModel,
    task: Task,
    units: int,
    length: int,
    index: int,
    seed: int,
    opened: NDArray[np.float64] | None,
) -> Example | None:
    """What the model writes after prompt `index`; None where the prompt does not fit.

    `opened` [routed layers] is filled in: how much of the needle was open to the answer.
    """
    fitted = fit_prompt(task, seed, length, index, units, model.encode)
    if fitted is None:
        return None
    prompt, ids, _ = fitted

    def look(cache: Any) -> None:
        if opened is not None:
            needle = find_needle(model, prompt.text, prompt.answers[0])
            opened[:] = open_shares(cache, needle, len(ids))

    prediction = model.generate(ids, task.new_tokens, look)
    return Example(
        task=task.name,
        length=length,
        answers=prompt.answers,
        prediction=prediction,
        score=task.score(prompt.answers, prediction),
    )
