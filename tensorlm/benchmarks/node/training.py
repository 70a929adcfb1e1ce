"""Part `train`: real runs of Llama-8B on all GPUs and on one, beside the plan's predictions."""

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from tensorlm.plan.gpus import GIB
from tensorlm.plan.job import CUDA, plan_jobs
from tensorlm.plan.memory import gpu_memory
from tensorlm.plan.speed import step_time
from tensorlm.train.metrics import read_metrics

from .host import Host
from .launch import Ended, train
from .trace import read_exchanges

Row = dict[str, Any]
MOST_STEPS, FEWEST_STEPS = 20, 4
START_SECONDS = 45.0  # imports, weights, the first step's kernels
_SHARE = 0.75  # of the time left that the remaining runs of this part may plan to use


class Case(NamedTuple):
    """One run: ranks, ZeRO stage, ranks that share a row, tokens of a row, other settings."""

    ranks: int
    stage: int
    sp: int
    tokens: int
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"train-{self.ranks}-zero{self.stage}-sp{self.sp}-{self.tokens}"

    @property
    def words(self) -> str:
        rows = f"{self.rows} x {self.tokens:,} tokens"
        return f"{self.ranks} GPU: ZeRO-{self.stage}, {rows}, sp {self.sp}"

    @property
    def rows(self) -> int:
        """Rows of a step: one for each group of ranks that shares rows."""
        return self.ranks // self.sp

    @property
    def settings(self) -> list[str]:
        return [
            f"parallel.sp={self.sp}", f"zero.stage={self.stage}", f"data.seq_len={self.tokens}",
            f"train.rows_per_step={self.rows}", *self.more,
        ]  # fmt: skip


def cases(host: Host) -> list[Case]:
    """The runs, most important first."""
    short, long = host.length(32_768), host.length(131_072)
    one = Case(1, 1, 1, short)
    if host.ranks == 1:
        return [one]
    everyone = host.ranks
    return [
        one,
        Case(everyone, 1, 1, short),
        Case(everyone, 3, everyone, long),
        Case(everyone, 3, 1, short),
        Case(everyone, 1, 1, long),
    ]


def measure(host: Host) -> Iterator[Row]:
    """Run every case for which time is left; its number of steps follows the time."""
    todo = cases(host)
    alone: float | None = None
    for number, case in enumerate(todo):
        seconds = host.seconds_left * _SHARE / (len(todo) - number)
        if not seconds:
            return
        row = run_case(host, case, num_steps(seconds, predict(host, case)["predicted s"]))
        speed = row["tokens/s/GPU"]
        alone = speed if case.ranks == 1 else alone
        yield row | {"vs 1 GPU": speed / alone if speed and alone else None}


def run_case(host: Host, case: Case, steps: int) -> Row:
    """Train for `steps` steps, and describe the run; the last of several steps is traced."""
    settings = host.settings(case.name, *case.settings, f"train.steps={steps}")
    if steps > 1:
        settings.append(f"train.profile=[{steps},{steps + 1}]")
    launcher = "deepspeed" if case.stage == 3 else "torchrun"
    ended = train(host, launcher, case.ranks, case.name, settings)
    return describe(host, case, ended, steps) | predict(host, case)


def num_steps(seconds: float, step_seconds: float | None) -> int:
    """Number of steps that fit into `seconds`, start included, within bounds."""
    fitting = int((seconds - START_SECONDS) / step_seconds) if step_seconds else FEWEST_STEPS
    return max(FEWEST_STEPS, min(MOST_STEPS, fitting))


def predict(host: Host, case: Case) -> Row:
    """What the plan predicts for this run."""
    job = plan_jobs(host.config(host.settings(case.name, *case.settings)), case.ranks, CUDA)[-1]
    sheet = host.sheet
    return {
        "predicted GiB": gpu_memory(job).allocated / GIB,
        "predicted s": step_time(job, sheet).seconds if sheet else None,
    }


def describe(host: Host, case: Case, ended: Ended, steps: int) -> Row:
    """One row of the table; the medians leave out the first step and the traced one."""
    records = read_metrics(host.folder / case.name)
    timed = records[1 : steps - 1] or records[1:] or records
    median = {
        key: statistics.median(record[f"perf/{key}"] for record in timed) if timed else None
        for key in ("tokens_per_second", "mfu", "memory_gib")
    }
    speed = median["tokens_per_second"]
    losses = [record["train/loss"] for record in records]
    exchanges = read_exchanges(host.folder / case.name)
    tokens = case.tokens * case.rows
    return {
        "run": case.words,
        "steps": f"{len(records)} of {steps}",
        "loss": f"{losses[0]:.3f} -> {losses[-1]:.3f}" if losses else None,
        "s/step": tokens / speed if speed else None,
        "tokens/s/GPU": speed / case.ranks if speed else None,
        "MFU": median["mfu"],
        "GiB": median["memory_gib"],
        "exchanges: zero": exchanges and exchanges.zero,
        "rows": exchanges and exchanges.rows,
        "exposed": exchanges and exchanges.exposed,
        "start s": ended.seconds - sum(tokens / r["perf/tokens_per_second"] for r in records),
        "exit": ended.outcome,
    }  # fmt: skip
