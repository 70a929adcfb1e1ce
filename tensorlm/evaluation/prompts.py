"""Prompts that fill a context: how many units of filler fit, and what counts as an answer.

A task builds a prompt from a random generator and a number of units of filler (words, lines,
documents). The same seed, task, length and index give the same bytes in every process.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and the strings that the continuation should hold."""

    text: str
    answers: list[str]


NO_END = 1 << 40  # units of a filler that can be repeated

# (random generator, units of filler) -> prompt
Build = Callable[[Random, int], Prompt]
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Task:
    """How one task makes and scores its prompts.

    least_units, unit_step: the smallest filler, and by how much it grows; most_units: as much as
    the source of the filler has; any_answer: one of the answers is enough.
    """

    name: str
    build: Build
    new_tokens: int
    least_units: int
    unit_step: int
    most_units: int = NO_END
    any_answer: bool = False

    def prompt(self, seed: int, length: int, index: int, units: int) -> Prompt:
        """Prompt `index` of this task at `length` tokens with so many units of filler."""
        return self.build(Random(f"{seed} {self.name} {length} {index}"), units)

    def score(self, answers: list[str], prediction: str) -> float:
        """0 to 1: the share of the answers that the prediction holds, in any case of letters."""
        text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
        found = [answer.lower() in text for answer in answers]
        return float(any(found)) if self.any_answer else sum(found) / len(found)


_CONTROL = re.compile(r"[\x00-\x1f]")


def fit_prompt(
    task: Task, seed: int, length: int, index: int, units: int, encode: Encode
) -> tuple[Prompt, list[int], int] | None:
    """Prompt `index` with at most `units`, fewer where it and its answer exceed `length` tokens.

    Returns:
        The prompt, its ids, and its units; None where even the shortest prompt is too long.
    """
    while True:
        prompt = task.prompt(seed, length, index, units)
        ids = encode(prompt.text)
        excess = len(ids) + task.new_tokens - length
        if excess <= 0:
            return prompt, ids, units
        if units <= task.least_units:
            return None
        steps = math.ceil(excess * units / len(ids) / task.unit_step)
        units = max(task.least_units, units - steps * task.unit_step)


def first_units(task: Task, seed: int, length: int, num_prompts: int, encode: Encode) -> int | None:
    """`fit_units` of the first of `num_prompts` prompts that fits; None: none of them does.

    Prompts differ in what cannot be left out of them (a question's own paragraphs, say).
    """
    for index in range(num_prompts):
        units = fit_units(task, seed, length, encode, index)
        if units is not None:
            return units
    return None


def fit_units(task: Task, seed: int, length: int, encode: Encode, index: int = 0) -> int | None:
    """Most units with which prompt `index` and its answer stay within `length` tokens.

    The number of tokens is nearly linear in that of units, so a few prompts are enough: each probe
    lies where the line through the last two reaches the budget, between the most units known to
    fit and the fewest known not to. The search ends because this interval only shrinks.

    Returns:
        A multiple of `unit_step` above `least_units`, at most `most_units`; None: not even
        `least_units` fit.
    """
    budget, step = length - task.new_tokens, task.unit_step

    def count(units: int) -> int:
        return len(encode(task.prompt(seed, length, index, units).text))

    fits, tokens = task.least_units, count(task.least_units)
    if tokens > budget:
        return None
    # A line of a filler without end is a quarter of a token at least, or the encoder is no use.
    limit = task.most_units if task.most_units < NO_END else max(fits, 4 * budget)
    num_steps = (limit - fits) // step  # steps from `fits` that are not known to be too many
    guess = min(num_steps, max(1, (3 * fits + step) // step))
    while num_steps > 0:
        found = count(fits + guess * step)
        per_step = (found - tokens) / guess
        if found <= budget:
            fits, tokens, num_steps = fits + guess * step, found, num_steps - guess
            guess = 4 * fits // step + 1 if per_step <= 0 else int((budget - tokens) / per_step)
        else:
            num_steps = guess - 1
            guess = int((budget - tokens) / per_step)
        guess = min(guess, num_steps)
        if guess == 0:
            break
    return fits
