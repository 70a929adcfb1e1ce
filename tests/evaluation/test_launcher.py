"""The evaluation launcher and the evaluations of a training run, as users start them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fold_parallel import Grid
from tensorlm.checkpoint import select_checkpoint
from tensorlm.config import load_config
from tensorlm.data.tokenizer.training import train_tokenizer
from tensorlm.evaluation.model import (
    open_checkpoint_model,
    open_hugging_face_model,
    open_random_model,
)
from tensorlm.evaluation.results import read_report
from tensorlm.evaluation.run import evaluate
from tensorlm.evaluation.text import held_out_documents
from tensorlm.hf.export_folder import export_checkpoint
from tensorlm.runtime.errors import UserError
from tests.evaluation.solver import save_untrained, solved_text, write_inputs
from tests.support.launching import ROOT, TrainRanks


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    path = write_inputs(tmp_path / "untrained")
    config = load_config(path)
    save_untrained(config)
    (tmp_path / "file").write_text("mine")
    command = [sys.executable, "-c", MISTAKES, str(path), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    expected = [
        "error: eval.lengths: a held-out document must have 1048577 tokens",
        "eval: lengths: must divide the longest length = 90, got 60",
        "error: --lengths: must be integers above 0 with commas between them, got foo (like",
        "error: --lengths: must be integers above 0 with commas between them, got 60,,90 (like",
        "eval.tasks.0: must be 'ppl', 'recall', 'passkey', 'niah' or 'ruler'",
        "eval: near: must be at least 4, or 0 (not measured), got 3",
        "eval: ruler: must be one of niah_single_1, ",
        "eval: ruler: qa_1 and qa_2 need data files (set eval.qa)",
        "must contain config.json (write the folder with launcher/convert.py export)",
        f"{tmp_path}/file: cannot be written (Not a directory; choose another folder with --out",
        f"{tmp_path}/file/out: cannot be written (Not a directory; ",
        "error: /proc: cannot be written (",
        f"error: {config.run.dir}: no checkpoint of step 4 (choose one of 0)",
        "--config: missing",
        "--compare: must contain report.json, got none below",
    ]
    assert len(found) == len(expected), result.stderr
    for line, part in zip(found, expected, strict=True):
        assert part in line
    assert not (tmp_path / "new").exists()  # nothing was measured


# Several mistakes in one process: importing torch takes longer than all of them.
MISTAKES = """
import sys
from tensorlm.commands.evaluate import main
from tensorlm.runtime.errors import UserError
config, folder = sys.argv[1:]
for arguments in (
    ["--config", config, "--lengths", "1048576"],
    ["--config", config, "--lengths", "60,90"],
    ["--config", config, "--lengths", "foo"],
    ["--config", config, "--lengths", "60,,90"],
    ["--config", config, "--tasks", "pll"],
    ["--config", config, "eval.near=3"],
    ["--config", config, 'eval.ruler=["vtt"]'],
    ["--config", config, 'eval.ruler=["qa_1"]'],
    ["--config", config, "--hf", folder, "--tasks", "niah", "zero.stage=3", "eval.every=9"],
    *(  # found before there turns out to be no such checkpoint
        ["--config", config, "--checkpoint", "7", "--output", output]
        for output in (f"{folder}/file", f"{folder}/file/out", "/proc")
    ),
    ["--config", config, "--checkpoint", "4", "--output", f"{folder}/new/report"],
    [],
    ["--compare", folder, "--output", folder],
):
    sys.argv = ["launcher/evaluate.py", *arguments]
    try:
        main()
    except UserError as error:
        for problem in error.problems:
            print("error:", problem, file=sys.stderr)
"""


def test_another_tokenizer_than_the_models_is_refused(tmp_path: Path) -> None:
    path = write_inputs(tmp_path / "untrained")
    config = load_config(path)
    save_untrained(config)
    device, grid = torch.device("cpu"), Grid()
    assert len(open_checkpoint_model(config, 0, device, grid).tokenizer) == 400
    for vocab_size in (380, 420):
        other = tmp_path / str(vocab_size) / "tokenizer"
        train_tokenizer([solved_text(i, 20) for i in range(20)], vocab_size, other)
        config = load_config(path, [f"data.path={other.parent}"])
        with pytest.raises(UserError) as caught:
            open_checkpoint_model(config, 0, device, grid)
        (line,) = caught.value.problems
        assert line.startswith(
            f"{other}: must be the tokenizer with which the data was encoded (set"
        )
    with pytest.raises(
        UserError, match=r"tokenizer: must have at most vocab_size = 400 ids, got 420"
    ):
        open_random_model(config, device, grid)
    folder = tmp_path / "hf"
    export_checkpoint(select_checkpoint(Path(config.run.dir), 0), config, folder, "fp32", other)
    with pytest.raises(UserError, match=r"hf: must have at most vocab_size = 400 ids, got 420"):
        open_hugging_face_model(config, folder, device, grid)


def test_models_are_named_by_their_whole_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_inputs(tmp_path / "untrained")
    config = load_config(path, ["run.dir=run"])
    save_untrained(config)
    tokenizer = tmp_path / "untrained/data/tokenizer"
    export_checkpoint(select_checkpoint(Path("run"), 0), config, Path("big/hf"), "fp32", tokenizer)
    where = (torch.device("cpu"), Grid())
    assert open_checkpoint_model(config, 0, *where).name == str(tmp_path / "run")
    assert open_random_model(config, *where).name == str(tmp_path / "run/random weights")
    found = open_hugging_face_model(config, Path("big/hf"), *where)
    assert found.name == str(tmp_path / "big/hf")


@pytest.mark.parametrize(
    ("ranks", "stage", "tasks"),
    [(2, 3, '["ppl"]'), (1, 2, '["ppl","passkey"]')],
    ids=["zero 3", "zero 2"],
)
def test_training_evaluates_every_few_steps(
    data: Path, tmp_path: Path, config: Path, train_ranks: TrainRanks, ranks: int, stage: int,
    tasks: str,
) -> None:  # fmt: skip
    train_ranks(
        "train.stop_at=4", "eval.every=2", f"zero.stage={stage}", f"eval.tasks={tasks}",
        "eval.lengths=[128,256]", "eval.near=64", "eval.max_tokens=768", "eval.depths=1",
        "eval.repeats=2", "checkpoint.every=4", ranks=ranks,
    )  # fmt: skip
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 4
    reports = [read_report(tmp_path / f"run/eval/step-0000000{n}/report.json") for n in (2, 4)]
    assert reports[1].perplexity[0].loss < reports[0].perplexity[0].loss  # it learned in between
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [point.step for point in events.Scalars("eval/ppl/128")] == [2, 4]

    # The same checkpoint, evaluated afterwards on one process.
    overrides = ["eval.lengths=[128,256]", "eval.near=64", "eval.max_tokens=768"]
    settings = load_config(config, overrides)
    model = open_checkpoint_model(settings, 4, torch.device("cpu"), Grid())
    documents = held_out_documents(settings, model.tokenizer, Path(data) / "tokenizer")
    after = evaluate(settings.eval, model, documents)
    for a, b in zip(reports[1].perplexity, after.perplexity, strict=True):
        assert a.perplexity == pytest.approx(b.perplexity, rel=1e-5)
