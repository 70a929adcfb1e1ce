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
    most_units: int = 1 << 40
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
) -> tuple[Prompt, list[int], int]:
    """Prompt `index` with at most `units`, fewer where it and its answer exceed `length` tokens.

    Returns:
        The prompt, its ids, and its units.
    """
    while True:
        prompt = task.prompt(seed, length, index, units)
        ids = encode(prompt.text)
        excess = len(ids) + task.new_tokens - length
        if excess <= 0 or units <= task.least_units:
            return prompt, ids, units
        steps = math.ceil(excess * units / len(ids) / task.unit_step)
        units = max(task.least_units, units - steps * task.unit_step)


def fit_units(task: Task, seed: int, length: int, encode: Encode) -> int | None:
    """Most units with which prompt 0 and its answer stay within `length` tokens; None: not any.

    The number of tokens is nearly linear in that of units: a few prompts are enough.
    """
    budget = length - task.new_tokens

    def count(units: int) -> int:
        return len(encode(task.prompt(seed, length, 0, units).text))

    best, tokens = task.least_units, count(task.least_units)
    if tokens > budget:
        return None
    probe = min(4 * best + task.unit_step, task.most_units)
    per_unit = (count(probe) - tokens) / max(1, probe - best)
    while True:
        more = int((budget - tokens) / max(per_unit, 1e-3) / task.unit_step) * task.unit_step
        guess = min(best + more, task.most_units)
        if guess <= best:
            return best
        _, ids, fitting = fit_prompt(task, seed, length, 0, guess, encode)
        if fitting < guess:
            return max(best, fitting)
        per_unit = (len(ids) - tokens) / (guess - best)
        best, tokens = guess, len(ids)
