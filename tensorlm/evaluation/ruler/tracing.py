"""RULER's variable tracking: following a chain of assignments scattered in noise."""

import string
from itertools import pairwise
from random import Random

from ..prompts import NOISE, Prompt, Task

_QUESTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {value}, they are: "
)
_NUM_HOPS = 4
EXAMPLE_TOKENS = 500


def tracing_task(example_units: int) -> Task:
    """`vt`: one chain of four hops, after one solved example with names of three letters.

    Args:
        example_units: lines of noise in the example (in RULER, as many as fit EXAMPLE_TOKENS).
    """

    def build(rng: Random, units: int) -> Prompt:
        example = _chain_prompt(rng, example_units, name_length=3)
        asked = _chain_prompt(rng, units, name_length=5)
        text = f"{example.text} {' '.join(example.answers)}\n\n{asked.text}"
        return Prompt(text, asked.answers)

    return Task("vt", build, new_tokens=30, least_units=10, unit_step=1)


def example_task() -> Task:
    """The solved example alone, to find its number of lines."""

    def build(rng: Random, units: int) -> Prompt:
        return _chain_prompt(rng, units, name_length=3)

    return Task("vt example", build, new_tokens=0, least_units=5, unit_step=1)


def _chain_prompt(rng: Random, units: int, name_length: int) -> Prompt:
    names: list[str] = []
    while len(names) < _NUM_HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=name_length))
        if name not in names:
            names.append(name)
    value = str(rng.randint(10000, 99998))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old} " for old, new in pairwise(names)]
    lines = [NOISE] * units
    for count, place in enumerate(sorted(rng.sample(range(units), len(chain)))):
        lines.insert(place + count, chain[count])
    context = "\n".join(lines)
    return Prompt(_QUESTION.format(context=context, value=value, count=len(names)), names)
