"""What recurs in the long documents of an adaptation, so that attending far back reduces the loss.

Two kinds: passages that are repeated, and short facts that are asked for later. Neither uses the
wording of an evaluation task.
"""

from random import Random

# In every third row of 8,192 tokens, a passage of about 48 to 400 tokens is repeated.
_PASSAGE = (150, 1300)  # characters
_PASSAGE_PERIOD = 75_000  # characters per repeated passage
_FACT_PERIOD = 4_000  # characters per fact, about 1,000 tokens
_REACH = 20_000  # maximum characters between the two places, about 7,000 tokens

# (fact, later question and answer): {key} is a made-up name, {value} a number.
_FACTS = (
    ("Note: the number of {key} is {value}.", "Which number does {key} have? It is {value}."),
    ("{key} = {value}", "assert {key} == {value}"),
    (
        "Please remember {value}, which stands for {key}.",
        "As said above, {key} stands for {value}.",
    ),
    ("The code of the {key} lock is {value}.", "To open the {key} lock, enter {value}."),
)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def repeat_passages(text: str, seed: str) -> str:
    """`text` with one passage repeated per `_PASSAGE_PERIOD` characters, at most `_REACH` after
    itself."""
    rng, pieces, last = Random(seed), [], 0
    for period in range(0, len(text) - _PASSAGE_PERIOD, _PASSAGE_PERIOD):
        length = rng.randint(*_PASSAGE)
        distance = rng.randint(length, _REACH)
        start = period + rng.randrange(_PASSAGE_PERIOD - _REACH - length)
        place = text.find("\n", start + distance) + 1
        if last < place:
            pieces.append((place, text[start : start + length] + "\n"))
            last = place
    return _with(text, pieces)


def ask_for_facts(text: str, seed: str) -> str:
    """`text` with one fact per `_FACT_PERIOD` characters, asked for at most about `_REACH` later.

    Both stand on lines of their own. The names are made up, so that the answer can only be read
    from the fact.
    """
    rng = Random(seed)
    lines: list[tuple[int, str]] = []  # (place in `text`, line to insert there)
    for period in range(0, len(text) - _FACT_PERIOD, _FACT_PERIOD):
        start = period + rng.randrange(_FACT_PERIOD)
        key = _name(rng)
        value = str(rng.randrange(10 ** rng.randint(3, 7), 10**8))
        places = (start, start + rng.randint(1, _REACH))
        for place, form in zip(places, rng.choice(_FACTS), strict=True):
            end_of_line = text.find("\n", place)
            if end_of_line < 0:
                break
            lines.append((end_of_line + 1, form.format(key=key, value=value) + "\n"))
    lines.sort(key=lambda line: line[0])  # stable: a fact stays before its question
    return _with(text, lines)


def _with(text: str, pieces: list[tuple[int, str]]) -> str:
    """`text` with each piece inserted before the character at its place; places ascend."""
    parts, done = [], 0
    for place, piece in pieces:
        parts += [text[done:place], piece]
        done = place
    return "".join([*parts, text[done:]])


def _name(rng: Random) -> str:
    syllables = rng.randint(2, 4)
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables))
