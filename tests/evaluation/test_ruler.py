"""RULER's tasks: the same bytes anywhere, its own definitions, within the length, its scores."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tensorlm.config.evaluation import RULER_TASKS
from tensorlm.data.tokenizer.tokenizers import load_tokenizer
from tensorlm.evaluation.prompts import NOISE, Prompt, Task, fit_prompt, fit_units
from tensorlm.evaluation.ruler import ruler_tasks
from tensorlm.evaluation.ruler.niah import niah_tasks
from tensorlm.evaluation.text import Prose
from tensorlm.runtime.errors import UserError
from tests.support.launching import ROOT

PROSE = "It rained. The old clerk (he was tired) looked up. Who was there? Nobody came. " * 30
DIGEST = """
import hashlib
from tests.evaluation.test_ruler import PROSE, make_tasks
digest = hashlib.sha256()
for task in make_tasks(4096).values():
    digest.update(repr(task.prompt(7, 4096, 3, task.least_units + 20)).encode())
print(digest.hexdigest())
"""


def make_tasks(length: int, qa_files: list[Path] | None = None) -> dict[str, Task]:
    """The tasks at `length` bytes: a byte is a token here."""
    prose = Prose(PROSE, num_words=length)
    tasks = ruler_tasks(length, prose, qa_files or [], lambda text: list(text.encode()))
    return {task.name: task for task in tasks}


def build(name: str, length: int = 4096, units: int = 60) -> Prompt:
    return make_tasks(length)[name].prompt(0, length, 0, units)


def test_prompts_are_the_same_bytes_in_every_process() -> None:
    other = subprocess.run(
        [sys.executable, "-c", DIGEST], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    digest = hashlib.sha256()
    for task in make_tasks(4096).values():
        digest.update(repr(task.prompt(7, 4096, 3, task.least_units + 20)).encode())
    assert other.stdout.strip() == digest.hexdigest()


def test_prompts_differ_by_seed_length_and_index() -> None:
    task = make_tasks(4096)["niah_multikey_3"]
    keys = [(0, 64, 0), (1, 64, 0), (0, 65, 0), (0, 64, 1)]
    assert len({task.prompt(*key, 20).text for key in keys}) == 4


def test_eleven_tasks_need_no_file() -> None:
    assert list(make_tasks(4096)) == list(RULER_TASKS[:11])


@pytest.mark.parametrize("length", [2048, 8192, 16384])
def test_prompts_and_answers_fill_the_length_and_never_exceed_it(data: Path, length: int) -> None:
    tokenizer = load_tokenizer(data.parent / "tokenizer")

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    prose = Prose(PROSE, num_words=length)
    for task in ruler_tasks(length, prose, [], encode):
        units = fit_units(task, 0, length, encode)
        assert units is not None
        for index in range(2):
            fitted = fit_prompt(task, 0, length, index, units, encode)
            assert fitted is not None
            prompt, ids, _ = fitted
            assert ids == encode(prompt.text)
            assert len(ids) + task.new_tokens <= length
            assert len(ids) + task.new_tokens > 0.95 * length, task.name


@pytest.mark.parametrize(
    ("name", "num_needles", "num_answers", "value"),
    [
        ("niah_single_1", 1, 1, r"\d{7}"),
        ("niah_single_2", 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, r"[0-9a-f-]{36}"),
        ("niah_multikey_1", 4, 1, r"\d{7}"),
        ("niah_multikey_2", 61, 1, r"\d{7}"),
        ("niah_multikey_3", 61, 1, r"[0-9a-f-]{36}"),
        ("niah_multivalue", 4, 4, r"\d{7}"),
        ("niah_multiquery", 4, 4, r"\d{7}"),
    ],
)
def test_needles_are_in_the_haystack_and_asked_for(
    name: str, num_needles: int, num_answers: int, value: str
) -> None:
    prompt = build(name)
    needle = rf"One of the special magic \w+ for (\S+) is: ({value})\."
    found = re.findall(needle, prompt.text)
    assert len(found) == num_needles
    asked = prompt.text.splitlines()[-1]
    assert sorted(v for key, v in found if key in asked) == sorted(prompt.answers)
    assert len(prompt.answers) == num_answers
    assert asked.endswith("are" if num_answers > 1 else "is")
    assert asked.startswith("What are all the" if num_answers > 1 else "What is the")


def test_needles_stand_between_sentences_of_the_prose() -> None:
    text = build("niah_multikey_1", units=300).text.splitlines()[1]
    without = re.sub(r" ?One of the special magic numbers for \S+ is: \d+\.", "", text).strip()
    assert without == Prose(PROSE, 300).cut(300)[0]


def test_variable_chain_leads_from_the_value_to_every_answer() -> None:
    prompt = build("vt")
    asked = prompt.text.split("Memorize and track")[2]
    source = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", asked))
    (value,) = set(re.findall(r"assigned the value (\d+)", asked))
    assert len(prompt.answers) == 5
    for name in prompt.answers:
        while name in source:
            name = source[name]
        assert name == value
    example = prompt.text.split("Memorize and track")[1]
    assert len(re.findall(r"VAR \w{3} = ", example)) == 5  # solved, with shorter names


# The format of https://github.com/NVIDIA/RULER at c3f5e3b, scripts/data/synthetic: lines joined by
# one newline, later assignments with a space behind them, "assigned".
VT = (
    r"Memorize and track the chain\(s\) of variable assignment hidden in the following text\."
    r"\n\n(?P<context>.+)\n"
    r"Question: Find all variables that are assigned the value (?P<value>\d{5}) in the text "
    r"above\. Answer: According to the chain\(s\) of variable assignment in the text above, 5 "
    r"variables are assigned the value (?P=value), they are: "
)


def test_variable_tracking_is_spelled_and_spaced_as_in_rulers_repository() -> None:
    prompt = build("vt", units=12)
    pattern = VT.replace("<", "<example_").replace("P=value", "P=example_value")
    whole = re.compile(rf"{pattern} ([A-Z]{{3}}(?: [A-Z]{{3}}){{4}})\n\n{VT}", re.DOTALL)
    match = whole.fullmatch(prompt.text)
    assert match, prompt.text
    for name, letters, num_noise in (("context", 5, 12), ("example_context", 3, None)):
        lines = match[name].split("\n")
        kinds = [
            0 if line == NOISE
            else 1 if re.fullmatch(rf"VAR [A-Z]{{{letters}}} = \d{{5}}", line)
            else 2 if re.fullmatch(rf"VAR [A-Z]{{{letters}}} = VAR [A-Z]{{{letters}}} ", line)
            else 3
            for line in lines
        ]  # fmt: skip
        assert [kinds.count(kind) for kind in (1, 2, 3)] == [1, 4, 0]
        assert num_noise is None or kinds.count(0) == num_noise
        assert kinds.index(1) < kinds.index(2)


def test_solved_example_of_variable_tracking_fills_500_tokens() -> None:
    def encode(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text)

    prose = Prose(PROSE, 4096)
    (task,) = [t for t in ruler_tasks(4096, prose, [], encode) if t.name == "vt"]  # type: ignore[arg-type]
    example = re.split(r"(?<=they are: )", task.prompt(0, 4096, 0, 50).text)[0]
    assert 475 <= len(encode(example)) <= 500  # a line is 23 tokens, and none are for an answer


def test_needles_go_to_rulers_depths() -> None:
    sentences = [f"Sentence {i}." for i in range(1000)]
    words = " ".join(sentences).split()
    prose = Prose(" ".join(words), len(words))
    depths = {round(100 * i / 39) for i in range(40)}  # percent, rounded
    for task in niah_tasks(prose):
        if task.name in ("niah_single_2", "niah_multikey_1"):
            text = task.prompt(0, 4096, 0, len(words)).text.split("\n")[1]
            for needle in re.finditer(r"One of the special magic numbers for \S+ is: \d+\.", text):
                before = len(re.findall(r"Sentence", text[: needle.start()]))
                assert before / 10 in depths


@pytest.mark.parametrize(("length", "often", "seldom"), [(4096, 30, 3), (2048, 6, 1)])
def test_common_words_are_as_frequent_as_defined(length: int, often: int, seldom: int) -> None:
    prompt = build("cwe", length)
    asked = prompt.text.split("Below is a numbered list")[2].split("\nQuestion")[0]
    counts = Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", asked))
    assert counts == Counter({word: often if word in prompt.answers else seldom for word in counts})
    assert len(counts) == 60
    assert len(set(prompt.answers)) == 10


def test_frequent_words_fall_as_the_square_of_the_rank() -> None:
    prompt = build("fwe", units=6000)
    text = prompt.text.split("coded words. ")[1].split("\nQuestion")[0]
    ranked = Counter(text.split()).most_common(4)
    assert ranked[0][0] == "..."
    assert {word for word, _ in ranked[1:]} == set(prompt.answers)
    assert [count for _, count in ranked] == [int(6000 / k**2 / 1.6449340668) for k in (1, 2, 3, 4)]
    many = build("fwe", units=10**6).text.split("coded words. ")[1].split("\nQuestion")[0]
    assert len(set(many.split())) == (4096 - 50) // 50  # RULER subtracts the answer first


# Scores by lm-eval 0.4.13: string_match_all(postprocess_pred([prediction]), [answers]) of its
# tasks/ruler/common_utils.py.
LM_EVAL = [
    ("1234567", ["1234567"], 1.0),
    (" It is 1234567, and 7654321.", ["7654321", "1111111"], 0.5),
    ("BRAVE-Otter", ["brave-otter"], 1.0),
    ("12345\x00\x07 67", ["12345 67"], 0.0),
    ("\x01\x02 one\ntwo", ["one", "two", "three", "four"], 0.5),
    ("", ["a"], 0.0),
    ("ABC DEF", ["abc", "def", "c d", "x"], 0.75),
]


@pytest.mark.parametrize(("prediction", "answers", "score"), LM_EVAL)
def test_scores_equal_those_of_lm_eval(prediction: str, answers: list[str], score: float) -> None:
    assert make_tasks(4096)["vt"].score(answers, prediction) == score


# -------------------------------------------------------------------------------------- questions

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Article {a} paragraph {p}: the colour of town {a}{p} is c{a}{p}.",
                    "qas": [
                        {
                            "question": f"Which colour has town {a}{p}?",
                            "answers": [{"text": f"c{a}{p}"}, {"text": f"the colour c{a}{p}"}],
                            "is_impossible": False,
                        },
                        {"question": "Unanswerable?", "answers": [], "is_impossible": True},
                    ],
                }
                for p in range(4)
            ]
        }
        for a in range(5)
    ]
}
HOTPOT = [
    {
        "question": f"Who founded {i}?",
        "answer": f"founder{i}",
        "context": [[f"Title {i}{j}", [f"Fact {i}{j}. ", f"founder{i}."]] for j in range(2)],
    }
    for i in range(8)
]


def test_questions_come_with_the_paragraphs_that_answer_them(tmp_path: Path) -> None:
    files = [tmp_path / "squad.json", tmp_path / "hotpot.json"]
    for file, content in zip(files, (SQUAD, HOTPOT), strict=True):
        file.write_text(json.dumps(content))
    tasks = make_tasks(4096, files)
    assert list(tasks) == list(RULER_TASKS)
    for index in range(10):
        squad = tasks["qa_1"].prompt(0, 4096, index, 6)
        documents = re.findall(r"Document \d+:\n(.+)", squad.text)
        assert len(documents) == len(set(documents)) == 6
        assert any(squad.answers[0] in document for document in documents)
        same_article = sum(d.startswith(f"Article {squad.answers[0][1]}") for d in documents)
        assert same_article == 4  # its neighbors before strangers
        hotpot = tasks["qa_2"].prompt(0, 4096, index, 6)
        assert len(re.findall(r"Document \d+:", hotpot.text)) == 6
        assert hotpot.text.count(f"{hotpot.answers[0]}.") == 2
    assert tasks["qa_1"].score(["c1", "the colour c1"], "c1") == 1  # one answer is enough
    assert tasks["qa_1"].score(["c1", "the colour c1"], "c2") == 0


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"data": 3}')
    with pytest.raises(UserError, match=r"eval.qa: .*other.json: must be SQuAD or HotpotQA"):
        make_tasks(4096, [file])
