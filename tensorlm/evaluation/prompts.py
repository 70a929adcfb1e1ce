"""Prompts that fill a context: fitting the filler, and scoring answers.

A task builds a prompt from a random generator and a number of units of filler (words, lines,
documents). The same seed, task, length and index give the same bytes in every process.
"""

import math
import re
from collections.abc import Callable
from random import Random
from typing import NamedTuple


class Prompt(NamedTuple):
    """A text to continue, and the strings that the continuation should contain."""

    text: str
    answers: list[str]


# The noise sentences of the passkey task and of RULER's tasks.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NO_END = 1 << 40  # maximum units of a filler that can be repeated without end

# (random generator, units of filler) -> prompt
Build = Callable[[Random, int], Prompt]
Encode = Callable[[str], list[int]]


class Task(NamedTuple):
    """A task: makes and scores its prompts.

    Attributes:
        least_units: smallest filler.
        unit_step: step by which the filler grows.
        most_units: number of units that the source of the filler has.
        any_answer: True if one of the answers is enough.
    """

    name: str
    build: Build
    new_tokens: int
    least_units: int
    unit_step: int
    most_units: int = NO_END
    any_answer: bool = False

    def prompt(self, seed: int, length: int, index: int, units: int) -> Prompt:
        """Prompt `index` of this task for `length` tokens, with `units` units of filler."""
        return self.build(Random(f"{seed} {self.name} {length} {index}"), units)

    def score(self, answers: list[str], prediction: str) -> float:
        """The share (0 to 1) of the answers in the prediction, ignoring upper and lower case."""
        text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
        found = [answer.lower() in text for answer in answers]
        return float(any(found)) if self.any_answer else sum(found) / len(found)


_CONTROL = re.compile(r"[\x00-\x1f]")


def fit_prompt(
    task: Task, seed: int, length: int, index: int, units: int, encode: Encode
) -> tuple[Prompt, list[int], int] | None:
    """Prompt `index` with `units`, or fewer if it and its answer exceed `length` tokens.

    Returns:
        The prompt, its ids and its units; None if even the shortest prompt is too long.
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
    """`fit_units` of the first of `num_prompts` prompts that fits; None if none of them fits.

    Prompts differ in their fixed parts, such as a question's own paragraphs.
    """
    for index in range(num_prompts):
        units = fit_units(task, seed, length, encode, index)
        if units is not None:
            return units
    return None


def fit_units(task: Task, seed: int, length: int, encode: Encode, index: int = 0) -> int | None:
    """The largest number of units with which prompt `index` and its answer fit `length` tokens.

    The number of tokens is nearly linear in the number of units, so a few probes are enough. Each
    probe is where the line through the last two reaches the budget, between the most units known to
    fit and the fewest known not to fit. The search ends because this interval shrinks.

    Returns:
        `least_units` plus a multiple of `unit_step`, at most `most_units`; None if not even
        `least_units` fit.
    """
    budget, step = length - task.new_tokens, task.unit_step

    def count(units: int) -> int:
        return len(encode(task.prompt(seed, length, index, units).text))

    fits, tokens = task.least_units, count(task.least_units)
    if tokens > budget:
        return None
    # Assume that a line of repeatable filler has at least a quarter of a token.
    limit = task.most_units if task.most_units < NO_END else max(fits, 4 * budget)
    num_steps = (limit - fits) // step  # largest number of steps from `fits` that may still fit
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
