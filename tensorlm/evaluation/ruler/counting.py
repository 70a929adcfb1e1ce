"""RULER's aggregation tasks: finding common words in a list, and frequent coded words."""

import math
import string
from random import Random

from ..prompts import Prompt, Task
from .niah import words

_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
_NUM_COMMON = 10
_NEW_TOKENS = 50  # answer length of `fwe`, which RULER subtracts before sizing the vocabulary
_ZETA_2 = math.pi**2 / 6  # normalization of frequencies proportional to 1 / rank^2


def common_words_task(length: int) -> Task:
    """`cwe`: ten words appear 30 times each, the others 3 times (6 and 1 below 4,096 tokens)."""
    vocabulary = sorted({*words("noun"), *words("adjective"), *words("verb")})
    example, repeats = ((40, 10, 3), (30, 3)) if length >= 4096 else ((20, 3, 1), (6, 1))

    def word_list(rng: Random, count: int, often: int, seldom: int) -> tuple[str, list[str]]:
        chosen = rng.sample(vocabulary, count)
        common = chosen[:_NUM_COMMON]
        entries = common * often + chosen[_NUM_COMMON:] * seldom
        rng.shuffle(entries)
        return " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1)), common

    def build(rng: Random, units: int) -> Prompt:
        solved, solution = word_list(rng, *example)
        answer = " ".join(f"{i}. {word}" for i, word in enumerate(solution, 1))
        context, common = word_list(rng, units, *repeats)
        text = f"{_COMMON.format(context=solved)} {answer}\n{_COMMON.format(context=context)}"
        return Prompt(text, common)

    return Task(
        "cwe", build, new_tokens=120, least_units=10, unit_step=1, most_units=len(vocabulary)
    )


def frequent_words_task(length: int) -> Task:
    """`fwe`: coded words with frequency proportional to 1 / rank^2; the most frequent is dots."""

    def build(rng: Random, units: int) -> Prompt:
        vocabulary: dict[str, None] = {}
        while len(vocabulary) < max(4, (length - _NEW_TOKENS) // 50):
            vocabulary["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        coded = ["...", *list(vocabulary)[1:]]
        text: list[str] = []
        for rank, word in enumerate(coded, 1):
            text += [word] * int(units / rank**2 / _ZETA_2)
        rng.shuffle(text)
        return Prompt(_FREQUENT.format(context=" ".join(text)), coded[1:4])

    step = max(1, length // 256)
    return Task("fwe", build, new_tokens=_NEW_TOKENS, least_units=32, unit_step=step)
