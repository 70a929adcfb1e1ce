"""The metrics tell a model that uses its context from the same model when it cannot, and are the
same of its checkpoint and its exported folder.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fold_parallel import Grid
from tensorlm.checkpoint import select_checkpoint
from tensorlm.config import Config, load_config
from tensorlm.evaluation.model import EvaluatedModel, open_checkpoint_model
from tensorlm.evaluation.results import Report, read_report
from tensorlm.evaluation.run import evaluate
from tensorlm.evaluation.text import held_out_documents
from tensorlm.hf.export_folder import export_checkpoint
from tests.evaluation.solver import SPAN
from tests.support.forked import run_forked
from tests.support.launching import ROOT, launch_environment

SETTINGS = [
    'eval.tasks=["ppl","passkey"]',
    f"eval.lengths=[{SPAN}]",
    "eval.near=64",
    "eval.depths=5",
    "eval.repeats=4",
]
SMALL = ["eval.near=64", "eval.depths=2", "eval.repeats=2"]


def launch(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "launcher/evaluate.py", *arguments]
    result = subprocess.run(
        command, cwd=ROOT, env=launch_environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def measure(config: Config, model: EvaluatedModel) -> Report:
    documents = held_out_documents(config, model.tokenizer, Path(config.data.path) / "tokenizer")
    return evaluate(config.eval, model, documents)


@pytest.fixture
def config(solver: Path) -> Config:
    return load_config(solver, SETTINGS)


@pytest.fixture
def model(config: Config) -> EvaluatedModel:
    return open_checkpoint_model(config, None, torch.device("cpu"), Grid())


def accuracy(report: Report) -> float:
    return sum(cell.accuracy for cell in report.passkey) / len(report.passkey)


def test_a_model_that_finds_the_key_scores_high(config: Config, model: EvaluatedModel) -> None:
    report = measure(config, model)
    assert [cell.depth for cell in report.passkey] == [0, 0.25, 0.5, 0.75, 1]
    assert accuracy(report) > 0.7
    (found,) = report.attribution
    assert found.total.gain.low is not None
    assert found.total.gain.low > 0  # the answer's digits lie further back than 64 tokens
    assert report.perplexity[0].perplexity < 1.3


def test_without_attention_it_scores_nothing_and_gains_nothing(
    config: Config, model: EvaluatedModel
) -> None:
    with torch.no_grad():
        for block in model.network.layers:
            block.self_attn.o_proj.weight.zero_()
    report = measure(config, model)
    assert accuracy(report) == 0
    assert report.attribution[0].total.gain.mean == pytest.approx(0, abs=1e-6)
    assert report.perplexity[0].perplexity > 1.5


def test_a_model_that_sees_one_inner_axis_alone_finds_no_distant_key(
    config: Config, model: EvaluatedModel
) -> None:
    with torch.no_grad():
        for block in model.network.layers:
            block.self_attn.hop_bias.fill_(-1e4)  # nothing passes along the outer axis
    report = measure(config, model)
    assert all(cell.accuracy == 0 for cell in report.passkey if cell.depth < 0.5)
    assert report.attribution[0].total.gain.mean == pytest.approx(0, abs=1e-6)


def test_lengths_that_need_too_much_memory_are_named_with_what_fits(
    config: Config, model: EvaluatedModel
) -> None:
    def need_a_lot(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[1] > 90:
            torch.empty(1 << 60)

    model.network.register_forward_pre_hook(need_a_lot)
    settings = config.eval.model_copy(update={"tasks": ("ppl",), "lengths": (45, 90, SPAN)})
    documents = held_out_documents(config, model.tokenizer, Path(config.data.path) / "tokenizer")
    report = evaluate(settings, model, documents)
    assert [result.length for result in report.perplexity] == [45, 90]
    assert report.notes == []  # nothing is longer than in training
    assert report.problems == [
        f"eval.lengths: ppl at {SPAN} tokens does not fit into memory (90 fits)"
    ]


def test_needles_and_ruler_are_scored_where_they_fit(config: Config, model: EvaluatedModel) -> None:
    settings = config.eval.model_copy(
        update={
            "tasks": ("niah", "ruler"), "lengths": (64, 1024), "depths": 2, "repeats": 1,
            "samples": 2, "ruler": ("niah_single_1", "fwe"),
        }
    )  # fmt: skip
    documents = held_out_documents(config, model.tokenizer, Path(config.data.path) / "tokenizer")
    report = evaluate(settings, model, documents)
    assert [(cell.length, cell.depth) for cell in report.niah] == [(1024, 0), (1024, 1)]
    assert [(score.task, score.length) for score in report.ruler] == [
        ("niah_single_1", 1024),
        ("fwe", 1024),
    ]
    assert all(score.score < 0.5 for score in report.ruler)  # it learned nothing like them
    (note,) = report.notes
    assert note == "64 tokens are too few for the prompts of: niah, niah_single_1, fwe"
    assert len(report.examples) == 2 + 4


def test_checkpoint_and_exported_folder_have_one_report(solver: Path, tmp_path: Path) -> None:
    config = load_config(solver)
    run_dir = Path(config.run.dir)
    settings = ["--config", str(solver), *SMALL]
    tasks = ["--lengths", f"90,{SPAN}", "--tasks", "ppl,passkey"]
    ours = run_forked("evaluate.py", *settings, *tasks)
    assert ours.returncode == 0, ours.stderr
    assert "Perplexity by length" in ours.stdout
    assert "perplexity at 96 tokens was not measured" in ours.stdout
    folder = run_dir / "eval/step-00000000"
    assert {"report.json", "report.md", "report.html", "passkey.png"} <= {
        path.name for path in folder.iterdir()
    }
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert f"eval/ppl/{SPAN}" in events.Tags()["scalars"]

    checkpoint = select_checkpoint(run_dir, 0)
    tokenizer = Path(config.data.path) / "tokenizer"
    export_checkpoint(checkpoint, config, tmp_path / "hf", "fp32", tokenizer)
    output = ("--output", str(tmp_path / "report"))
    exported = launch(*settings, *tasks, "--hf", str(tmp_path / "hf"), *output)
    assert "You are using a model of type" not in exported.stderr
    checkpoint_report = read_report(folder / "report.json")
    exported_report = read_report(tmp_path / "report/report.json")
    assert exported_report.trained_length == checkpoint_report.trained_length == 96
    for a, b in zip(checkpoint_report.perplexity, exported_report.perplexity, strict=True):
        assert a.perplexity == pytest.approx(b.perplexity, rel=1e-5)
    assert checkpoint_report.passkey == exported_report.passkey
    assert checkpoint_report.passkey[-1].accuracy > 0

    parts = (str(folder), str(tmp_path / "report"))
    joint = run_forked("evaluate.py", "--compare", *parts, "--output", str(tmp_path / "joint"))
    assert joint.returncode == 0, joint.stderr
    assert "run step 0" in joint.stdout
    page = (tmp_path / "joint/report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
