"""The points of `launcher/benchmark.py memory`, each measured in a separate process.

If a process fails or runs out of memory, the other points are still measured.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from tensorlm.config import Config, Section, load_config, read_tree
from tensorlm.config.settings_errors import problem_lines
from tensorlm.plan.gpus import GIB
from tensorlm.plan.job import plan_jobs
from tensorlm.plan.memory import gpu_memory
from tensorlm.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
_8B = "configs/llama8b_32k_fold.toml"
_BASE = ("train.rows_per_step=1", "train.steps=100", "data.path=unused")
_SHAPES = {
    "0.1B": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_layers": 12,
             "num_heads": 12, "num_kv_heads": 4},
    "1.2B": {"hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16,
             "tie_embeddings": True},
    "3.2B": {"hidden_size": 3072, "intermediate_size": 8192, "num_layers": 28, "num_heads": 24,
             "tie_embeddings": True},
    "2.8B, width of 8B": {"num_layers": 8},
    "8B": {},
}  # fmt: skip
_PLAIN, _AGAIN = "train.recompute=none", "train.recompute=block"
_TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_layers": 4,
         "num_heads": 4, "num_kv_heads": 2, "fold": [64]}  # fmt: skip


class Point(Section):
    """One configuration to measure."""

    name: str
    config: str = Field(_8B, description="TOML file, relative to this folder or the repository")
    settings: tuple[str, ...] = Field((), strict=False, alias="set", description="key.sub=value")
    steps: int = Field(3, ge=2, description="optimizer steps; the first is not timed")


def _point(shape: str, tokens: int, *settings: str, steps: int = 3) -> Point:
    """A point of the 8B configuration with one of the shapes above."""
    sizes = [f"model.{key}={str(value).lower()}" for key, value in _SHAPES[shape].items()]
    what = ", ".join(s.split(".")[1].removesuffix("=true") for s in settings if s != _AGAIN)
    name = f"{shape}, {tokens // 1024}k: {what or 'recomputed'}"
    every = [*_BASE, f"data.seq_len={tokens}", *sizes, *settings]
    return Point.model_validate({"name": name, "set": every, "steps": steps})


def default_points(on_gpu: bool) -> list[Point]:
    """Default points: ten minutes on one GPU of 139 GiB, or small ones counted on a CPU."""
    if not on_gpu:
        sizes = [f"model.{key}={value}" for key, value in _TINY.items()]
        common = [*_BASE, "data.seq_len=1024", "train.loss_chunk=256", *sizes]
        extras = {
            "stage 0": ["zero.stage=0", _PLAIN, "train.dtype=fp32"],
            "stage 1": ["zero.stage=1", _PLAIN],
            "stage 1, recomputed": ["zero.stage=1", _AGAIN, "train.rows_per_step=2"],
            "stage 1, recomputed, tiles": ["zero.stage=1", _AGAIN, "train.mlp_chunk=128"],
            "stage 2, bf16 moments": ["zero.stage=2", _AGAIN, "optim.state_dtype=bf16"],
            "stage 3, full layers": ["zero.stage=3", _PLAIN, "model.full_every=2"],
        }
        return [
            Point.model_validate({"name": name, "set": [*common, *extra], "steps": 2})
            for name, extra in extras.items()
        ]
    bf16, two_rows = "optim.state_dtype=bf16", "train.rows_per_step=2"
    return [
        _point("0.1B", 8192, _PLAIN, "zero.stage=2", "train.micro_batch=2", two_rows),
        _point("0.1B", 32768, _PLAIN, "zero.stage=3"),
        _point("0.1B", 131072, _AGAIN, "zero.stage=1"),
        _point("1.2B", 8192, _PLAIN, "zero.stage=1"),
        _point("1.2B", 32768, _AGAIN, "zero.stage=2", two_rows),
        _point("1.2B", 32768, _AGAIN, "zero.stage=3", "zero.offload_optimizer=true", steps=2),
        _point("1.2B", 131072, _AGAIN, "zero.stage=3"),
        _point("1.2B", 131072, _AGAIN, "zero.stage=2", "train.activation_offload=true"),
        _point("2.8B, width of 8B", 8192, _PLAIN, "zero.stage=3"),
        _point("2.8B, width of 8B", 32768, _AGAIN, "zero.stage=2", "train.mlp_chunk=4096"),
        _point("2.8B, width of 8B", 131072, _AGAIN, "zero.stage=3", bf16),
        _point("3.2B", 32768, _AGAIN, "zero.stage=2", bf16),
        _point("8B", 32768, _AGAIN, "zero.stage=1", bf16, "train.mlp_chunk=8192"),
    ]  # fmt: skip


def read_points(path: Path) -> list[Point]:
    """Points of a TOML file: `[[points]]` with name, config, set = ["key.sub=value"], steps.

    Raises:
        UserError: what is wrong in it, one line each.
    """
    try:
        points = [Point.model_validate(entry) for entry in read_tree(path)["points"]]
    except (KeyError, TypeError):
        raise UserError(f"{path}: must contain [[points]]") from None
    except ValidationError as error:
        raise UserError(*problem_lines(error, str(path))) from None
    for point in points:
        point_config(point)
    return points


def point_config(point: Point) -> Config:
    """The checked configuration of a point.

    Raises:
        UserError: see `load_config`.
    """
    path = Path(point.config)
    return load_config(path if path.exists() else ROOT / path, point.settings)


class Outcome(NamedTuple):
    """The result of one process, or the reason why there is none."""

    name: str
    numbers: dict[str, Any] | None  # `memory.Measurement`
    problem: str = ""


def measure_points(points: Sequence[Point], seconds: float, each: float) -> Iterator[Outcome]:
    """Measure each point in a separate process, the largest last.

    Args:
        points: the points.
        seconds: time limit for all points.
        each: time limit in seconds for one point.
    """
    deadline = time.monotonic() + seconds
    for point in sorted(points, key=_size):
        left = min(deadline - time.monotonic(), each)
        yield (
            _measure(point, left)
            if left > 0
            else Outcome(point.name, None, "not measured: out of time")
        )


def _size(point: Point) -> int:
    return gpu_memory(plan_jobs(point_config(point), 1)[-1]).allocated


def _measure(point: Point, seconds: float) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [
            sys.executable, str(ROOT / "launcher/benchmark.py"), "memory", "--answer", str(answer),
            "--one", point.model_dump_json(by_alias=True),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome(point.name, None, f"took more than {seconds:.0f} s")
        if answer.exists():
            return Outcome(point.name, json.loads(answer.read_text()))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if "OutOfMemoryError" in done.stderr:
        return Outcome(point.name, None, "out of memory")
    return Outcome(point.name, None, lines[-1][:120] if lines else f"exit code {done.returncode}")


TABLE_HEAD = (
    "| point | predicted GiB | allocated GiB | reserved GiB | predicted / allocated | predicted s "
    "| measured s |\n" + "|---" * 7 + "|"
)


def format_outcome(outcome: Outcome) -> str:
    """One line of the table."""
    numbers = outcome.numbers
    if numbers is None:
        return f"| {outcome.name} | {outcome.problem} |" + " |" * 5
    predicted, allocated, reserved = (
        numbers[key] / GIB for key in ("predicted", "allocated", "reserved")
    )
    seconds = numbers["predicted_seconds"]
    return (
        f"| {outcome.name} | {predicted:.3f} | {allocated:.3f} "
        f"| {f'{reserved:.3f}' if reserved else '-'} | {predicted / allocated:.3f} "
        f"| {f'{seconds:.2f}' if seconds else '-'} | {numbers['seconds']:.2f} |"
    )
