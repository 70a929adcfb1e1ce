"""Prompts fill their length with any tokenizer, and only those that do not fit are left out."""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from fold_parallel import Grid
from tensorlm.config.evaluation import EvalConfig
from tensorlm.evaluation.model import EvaluatedModel
from tensorlm.evaluation.prompts import Prompt, Task, fit_units
from tensorlm.evaluation.retrieval import needle_task, passkey_task
from tensorlm.evaluation.ruler.niah import niah_tasks
from tensorlm.evaluation.run import evaluate
from tensorlm.evaluation.scoring import score_tasks
from tensorlm.evaluation.text import Prose, make_prose

TEXT = "The cat sat. On a mat it was. "


class Characters:
    """A tokenizer whose tokens are characters; `decode` gives the text of documents."""

    bos_token_id = eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


class Documents:
    """Held-out texts, a character a token."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.lengths = texts, np.array([len(text) for text in texts])

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return np.array([ord(character) for character in self.texts[document][start:stop]])


class Answers(EvaluatedModel):
    """Answers every prompt by its own length in tokens, so that tests can see it."""

    def generate(
        self, prompt: list[int], num_tokens: int, look: Any = None, is_done: Any = None
    ) -> str:
        return str(len(prompt))


def make_model() -> Answers:
    config: Any = None  # neither losses nor tokens are computed
    device = torch.device("cpu")
    return Answers(config, torch.nn.Linear(1, 1), "/x/run", 1, 4096, Characters(), device, Grid())


@pytest.mark.parametrize("tokens_per_word", [0.9, 0.3, 0.01, 0.0])
def test_search_for_the_filler_ends_where_tokens_span_words(tokens_per_word: float) -> None:
    def encode(text: str) -> list[int]:
        return list(range(int(len(text.split()) * tokens_per_word)))

    prose = Prose(TEXT * 2000, 4096)
    for task in (needle_task(0.5, prose), *niah_tasks(prose), passkey_task(0.5)):
        units = fit_units(task, 0, 1024, encode)
        assert units is not None
        assert len(encode(task.prompt(0, 1024, 0, units).text)) + task.new_tokens <= 1024
        if task.name == "niah_single_2" and tokens_per_word < 0.3:
            assert units == prose.num_words  # all that there is


@pytest.mark.parametrize("tokens_per_word", [1.5, 1.0, 0.9, 0.3])
def test_prose_suffices_where_tokens_span_words(tokens_per_word: float) -> None:
    def encode(text: str) -> list[int]:
        return list(range(int(len(text.split()) * tokens_per_word)))

    prose = make_prose(Documents(TEXT * 9, TEXT * 700), Characters(), 4096, encode)
    task = needle_task(0.5, prose)
    units = fit_units(task, 0, 4096, encode)
    assert units is not None
    filled = len(encode(task.prompt(0, 4096, 0, units).text)) + task.new_tokens
    assert 4050 < filled <= 4096


def question_task(sizes: list[int]) -> Task:
    """Prompt `index` cannot be shorter than `sizes[index]` characters; a unit is 10 more."""

    class Indexed(Task):
        def prompt(self, seed: int, length: int, index: int, units: int) -> Prompt:
            return Prompt("x" * (sizes[index] + 10 * (units - 1)), ["no number"])

    def unused(rng: Random, units: int) -> Prompt:
        raise AssertionError

    return Indexed("qa_1", unused, new_tokens=10, least_units=1, unit_step=1, most_units=500)


def test_a_first_prompt_that_is_too_long_does_not_decide_for_the_others() -> None:
    found = score_tasks(make_model(), [question_task([900, 300, 800, 60])], 512, 4, 0, "")
    assert found is not None
    lengths = [int(example.prediction) for example in found.examples]
    assert lengths == [502 - (502 - 301) % 10]  # BOS and the question, filled up
    assert found.fits.tolist() == [[False, True, False, True]]
    assert found.mean(0) == (0.0, 2)
    assert found.num_left_out == 2


def test_prompts_that_do_not_fit_are_never_answered() -> None:
    found = score_tasks(make_model(), [question_task([60, 900, 400])], 512, 3, 0, "")
    assert found is not None
    assert found.fits.tolist() == [[True, False, True]]
    assert all(int(example.prediction) + 10 <= 512 for example in found.examples)
    assert score_tasks(make_model(), [question_task([900, 800])], 512, 2, 0, "") is None


def test_report_counts_the_questions_that_fit(tmp_path: Path) -> None:
    def article(title: str, size: int) -> dict[str, Any]:
        question = {"question": f"What is {title}?", "answers": [{"text": title}]}
        paragraph = {"context": f"{title} {'x' * size}", "qas": [question]}
        return {"paragraphs": [paragraph]}

    file = tmp_path / "squad.json"
    articles = [article(f"t{i}", 100 if i % 2 else 5000) for i in range(10)]
    file.write_text(json.dumps({"data": articles}))
    settings = EvalConfig(
        tasks=("ruler",), ruler=("qa_1",), lengths=(2048,), samples=20, qa=(str(file),)
    )
    report = evaluate(settings, make_model(), Documents(TEXT * 200))
    (score,) = report.ruler
    assert 0 < score.num_samples < 20
    (note,) = report.notes
    assert note.startswith(f"qa_1 at 2048 tokens: {20 - score.num_samples} of 20 prompts were skip")
