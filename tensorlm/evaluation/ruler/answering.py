"""RULER's question answering: paragraphs with the answer among many without it."""

import json
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tensorlm.runtime.errors import UserError

from ..prompts import Prompt, Task

_ASK = (
    "Answer the question based on the given documents. "
    "Only give me the answer and do not output any other words."
)
_QUESTION = (
    f"{_ASK}\n\nThe following are given documents.\n\n{{context}}\n\n{_ASK}\n\n"
    "Question: {question} Answer:"
)


class Question(NamedTuple):
    """A question. gold: paragraphs with the answer; near: others of its article, used first."""

    text: str
    answers: list[str]
    gold: list[int]
    near: list[int]


def qa_task(path: Path) -> Task:
    """`qa_1` from a SQuAD file, or `qa_2` from a HotpotQA file, recognized by content.

    Raises:
        UserError: the file is neither.
    """
    try:
        content = json.loads(path.read_text())
        is_squad = isinstance(content, dict)
        paragraphs, questions = (_read_squad if is_squad else _read_hotpot)(content)
    except OSError as error:
        raise UserError(f"eval.qa: {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"eval.qa: {path}: must be SQuAD or HotpotQA JSON") from None
    if not questions:
        raise UserError(f"eval.qa: {path}: must contain a question with an answer, got none")

    def build(rng: Random, units: int) -> Prompt:
        question = questions[rng.randrange(len(questions))]
        chosen = list(question.gold)
        room = max(0, units - len(chosen))
        if room <= len(question.near):
            chosen += rng.sample(question.near, room)
        else:
            taken = {*question.gold, *question.near}
            others = [i for i in range(len(paragraphs)) if i not in taken]
            room -= len(question.near)
            chosen += question.near + rng.sample(others, min(room, len(others)))
        rng.shuffle(chosen)
        context = "\n\n".join(f"Document {i}:\n{paragraphs[p]}" for i, p in enumerate(chosen, 1))
        return Prompt(_QUESTION.format(context=context, question=question.text), question.answers)

    return Task(
        "qa_1" if is_squad else "qa_2",
        build,
        new_tokens=32,
        least_units=1,
        unit_step=1,
        most_units=len(paragraphs),
        any_answer=True,
    )


def _read_squad(content: Any) -> tuple[list[str], list[Question]]:
    articles = [article["paragraphs"] for article in content["data"]]
    paragraphs = sorted({paragraph["context"] for article in articles for paragraph in article})
    index = {text: i for i, text in enumerate(paragraphs)}
    questions = []
    for article in articles:
        whole = [index[paragraph["context"]] for paragraph in article]
        for paragraph in article:
            gold = index[paragraph["context"]]
            near = [i for i in whole if i != gold]
            for entry in paragraph["qas"]:
                if not entry.get("is_impossible"):
                    answers = [answer["text"] for answer in entry["answers"]]
                    questions.append(Question(entry["question"], answers, [gold], near))
    return paragraphs, questions


def _read_hotpot(content: Any) -> tuple[list[str], list[Question]]:
    def paragraph(entry: Any) -> str:
        title, sentences = entry
        return f"{title}\n{''.join(sentences)}"

    paragraphs = sorted({paragraph(entry) for item in content for entry in item["context"]})
    index = {text: i for i, text in enumerate(paragraphs)}
    questions = [
        Question(
            item["question"],
            [item["answer"]],
            sorted({index[paragraph(entry)] for entry in item["context"]}),
            [],
        )
        for item in content
    ]
    return paragraphs, questions
