"""Passkey and needle in a haystack: finding one sentence anywhere in the context.

Passkey (Mohtashami and Jaggi, 2023) hides a number in repeated sentences. The needle task hides a
number in prose, with the wording of RULER's `niah_single_2`, at chosen depths.
"""

from random import Random

from .prompts import NOISE, Prompt, Task
from .ruler.niah import NEEDLE, niah_question, random_number, random_word
from .text import Prose, insert

_PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n{context}\n"
    "What is the pass key? The pass key is"
)


def passkey_task(depth: float) -> Task:
    """The passkey task: a five-digit key among repeated sentences, at `depth` (0 to 1)."""

    def build(rng: Random, units: int) -> Prompt:
        key = str(rng.randint(10000, 99999))
        lines = [NOISE] * units
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        lines.insert(round(depth * units), needle)
        return Prompt(_PASSKEY.format(context="\n".join(lines)), [key])

    return Task(f"passkey {depth:.4f}", build, new_tokens=12, least_units=1, unit_step=1)


def needle_task(depth: float, prose: Prose) -> Task:
    """The needle task: a seven-digit number among the sentences of `prose`, at `depth` (0 to 1)."""

    def build(rng: Random, units: int) -> Prompt:
        key, value = random_word(rng), random_number(rng)
        text, starts = prose.cut(units)
        place = int(starts[round(depth * (len(starts) - 1))])
        needle = NEEDLE.format(kind="numbers", key=key, value=value)
        context = insert(text, [place], [needle])
        return Prompt(niah_question("numbers", context, [key], is_single=True), [value])

    return Task(
        f"niah {depth:.4f}", build, new_tokens=24, least_units=10, unit_step=10,
        most_units=prose.num_words,
    )  # fmt: skip
