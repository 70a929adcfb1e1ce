"""Part `evaluation`: perplexity of the 8 B shape on windows shared by all GPUs; export of a run."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from .host import CONFIG, Host
from .launch import Ended, launcher_command, run_command, train
from .training import Row

_TWO_LAYERS = ("model.num_layers=2", "model.vocab_size=4096")


def measure(host: Host) -> Iterator[Row]:
    """Evaluate random weights; train, evaluate and export a model of two layers of that width."""
    length = host.length(131_072)
    shared = f"parallel.sp={host.ranks}"
    text = [f"eval.text={host.long_text}", f"eval.max_tokens={2 * length}", "eval.near=0"]
    evaluation = ["--lengths", str(length), "--tasks", "ppl"]
    name = "evaluate-random"
    shutil.rmtree(host.folder / name, ignore_errors=True)
    yield _run(host, name, "launcher/evaluate.py", [
        *host.settings(name, shared, *text), *evaluation, "--random-weights",
    ])  # fmt: skip
    if not host.seconds_left:
        return
    name = "evaluate-trained"
    small = host.settings(
        name, *_TWO_LAYERS, "train.steps=3", f"train.rows_per_step={host.ranks}",
        f"data.seq_len={host.length(32_768)}", "checkpoint.every=3",
    )  # fmt: skip
    ended = train(host, "torchrun", host.ranks, name, small)
    yield describe("launcher/train.py, two layers", host.ranks, ended)
    yield _run(host, name, "launcher/evaluate.py", [*small, shared, *text, *evaluation])
    output = host.folder / "exported"
    shutil.rmtree(output, ignore_errors=True)
    settings = [*small, "--output", str(output)]
    yield _run(host, name, "launcher/convert.py", settings, "export")


def _run(host: Host, name: str, program: str, arguments: list[str], verb: str = "") -> Row:
    """Run a command; an export needs no ranks."""
    command = [sys.executable] if verb else launcher_command("torchrun", host.ranks)
    assert command
    verbs = [verb] if verb else []
    called = [*command, program, *verbs, "--config", str(CONFIG), *arguments]
    ended = run_command(host, called, host.folder / f"{name}-{Path(program).stem}.log")
    return describe(f"{program} {verb}".strip(), 1 if verb else host.ranks, ended)


def describe(command: str, ranks: int, ended: Ended) -> Row:
    """One row of the table, with the line of the perplexity, or else the last line."""
    lines = ended.output.splitlines() or [""]
    heads = (number for number, line in enumerate(lines[:-1]) if line.startswith("length "))
    result = " ".join(lines[next(heads, -2) + 1].split())
    return {"command": command, "ranks": ranks, "seconds": ended.seconds,
            "exit": ended.outcome, "result": result[:100]}  # fmt: skip
