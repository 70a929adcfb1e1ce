"""RULER's needle tasks: one or several of 'the special magic numbers for X' in a haystack."""

import uuid
from functools import cache, partial
from random import Random
from typing import Literal, NamedTuple

import wonderwords

from ..prompts import NO_END, NOISE, Prompt, Task
from ..text import Prose, insert

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_QUESTION = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text are"
)
_SINGLE_QUESTION = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text is"
)
_DEPTHS = [round(100 * i / 39) for i in range(40)]  # depths of needles in prose, in percent

Kind = Literal["words", "numbers", "uuids"]


class Niah(NamedTuple):
    """One variant: `haystack` is repeated noise, prose, or other needles."""

    name: str
    haystack: Literal["noise", "prose", "needles"]
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


VARIANTS = (
    Niah("niah_single_1", "noise"),
    Niah("niah_single_2", "prose"),
    Niah("niah_single_3", "prose", value_kind="uuids"),
    Niah("niah_multikey_1", "prose", num_keys=4),
    Niah("niah_multikey_2", "needles"),
    Niah("niah_multikey_3", "needles", key_kind="uuids", value_kind="uuids"),
    Niah("niah_multivalue", "prose", num_values=4),
    Niah("niah_multiquery", "prose", num_keys=4, num_queries=4),
)


def niah_tasks(prose: Prose) -> list[Task]:
    """Tasks for all variants; the unit of a haystack is a word of prose or a line."""
    return [
        Task(
            variant.name,
            partial(_build, variant, prose),
            new_tokens=128,
            least_units=10,
            unit_step=1,
            most_units=prose.num_words if variant.haystack == "prose" else NO_END,
        )
        for variant in VARIANTS
    ]


def _build(variant: Niah, prose: Prose, rng: Random, units: int) -> Prompt:
    keys = [_random(variant.key_kind, rng) for _ in range(variant.num_keys)]
    values = [[_random(variant.value_kind, rng) for _ in range(variant.num_values)] for _ in keys]
    needles = [
        NEEDLE.format(kind=variant.value_kind, key=key, value=value)
        for key, those in zip(keys, values, strict=True)
        for value in those
    ]
    rng.shuffle(needles)
    if variant.haystack == "prose":
        text, starts = prose.cut(units)
        depths = rng.sample(_DEPTHS, len(needles))
        num_sentences = len(starts) - 1
        places = [int(starts[int(num_sentences * (depth / 100))]) for depth in depths]
        context = insert(text, places, needles)
    else:
        lines = _lines(variant, rng, units)
        for place in sorted(rng.sample(range(units), len(needles)), reverse=True):
            lines.insert(place, needles.pop())
        context = "\n".join(lines)
    asked = rng.sample(range(variant.num_keys), variant.num_queries)
    text = niah_question(
        variant.value_kind, context, [keys[i] for i in asked],
        is_single=variant.num_queries * variant.num_values == 1,
    )  # fmt: skip
    return Prompt(text, [value for i in asked for value in values[i]])


def _lines(variant: Niah, rng: Random, units: int) -> list[str]:
    if variant.haystack == "noise":
        return [NOISE] * units
    return [
        NEEDLE.format(
            kind=variant.value_kind,
            key=_random(variant.key_kind, rng),
            value=_random(variant.value_kind, rng),
        )
        for _ in range(units)
    ]


def niah_question(kind: Kind, context: str, keys: list[str], *, is_single: bool) -> str:
    """The text of a prompt: instruction, haystack, question and beginning of the answer."""
    query = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
    if is_single:
        return _SINGLE_QUESTION.format(kind=kind[:-1], context=context, query=query)
    return _QUESTION.format(kind=kind, context=context, query=query)


def _random(kind: Kind, rng: Random) -> str:
    return {"words": random_word, "numbers": random_number, "uuids": _random_uuid}[kind](rng)


def random_word(rng: Random) -> str:
    """An adjective and a noun, such as `brave-otter`."""
    return f"{rng.choice(words('adjective'))}-{rng.choice(words('noun'))}"


def random_number(rng: Random) -> str:
    """A number with seven digits."""
    return str(rng.randint(1_000_000, 9_999_999))


def _random_uuid(rng: Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


@cache
def words(category: Literal["noun", "adjective", "verb"]) -> list[str]:
    """The word list that RULER uses, sorted."""
    return sorted(set(wonderwords.RandomWord().filter(include_categories=[category])))
