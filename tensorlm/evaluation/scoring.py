"""Scoring the model's answers to many prompts, which the ranks share."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .model import EvaluatedModel
from .needle_blocks import find_needle, open_shares
from .prompts import Task, first_units, fit_prompt
from .ranks import compute_and_sum, progress
from .results import Example

_EXAMPLES = 2  # number of prompts of each task to show in the report


class Scores(NamedTuple):
    """Scores of the prompts of all ranks, and examples from this rank.

    scores: [tasks, prompts], 0 if the prompt does not fit; fits: [tasks, prompts] bool.
    opened: [routed layers, tasks, prompts], the fraction of the needle's tokens whose blocks were
    open; no layers unless the tasks hide a needle.
    """

    scores: NDArray[np.float64]
    fits: NDArray[np.bool_]
    opened: NDArray[np.float64]
    examples: list[Example]

    @property
    def num_left_out(self) -> int:
        """Number of prompts that do not fit."""
        return int((~self.fits).sum())

    def mean(self, task: int) -> tuple[float, int]:
        """Mean score of a task over the prompts that fit, and their number; (0, 0) if none fit."""
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

    A prompt that is too long even with the least filler is skipped.

    Args:
        model: the model.
        tasks: tasks of similar size: the filler that fits one prompt of the first is tried in all.
        length: maximum tokens of a prompt with its answer.
        num_prompts: number of prompts per task.
        seed: seed of the prompts.
        title: title of the progress bar.
        hide_needles: whether each prompt contains its answer, so that the blocks chosen for it
            are of interest.

    Returns:
        The scores; None if no prompt of the first task fits.

    Raises:
        DoesNotFitError: memory ran out.
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

    alone = range(model.grid.rank, model.grid.rank + 1)  # each prompt is answered by one rank
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
    """The model's answer to prompt `index`; None if the prompt does not fit.

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

    # More text cannot change a perfect score, and most tasks allow far more tokens than they need.
    prediction = model.generate(
        ids, task.new_tokens, look, lambda text: task.score(prompt.answers, text) == 1
    )
    return Example(
        task=task.name,
        length=length,
        answers=prompt.answers,
        prediction=prediction,
        score=task.score(prompt.answers, prediction),
    )
