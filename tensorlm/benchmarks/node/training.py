"""Part `train`: real runs of Llama-8B on all GPUs and on one, beside the plan's predictions."""

import itertools
import operator
import statistics
from collections.abc import Iterator, Sequence
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
MOST_STEPS, MOST_ALONE = 20, 6  # of a phase, on several GPUs and on one
FEWEST_STEPS, FEWEST_LATER = 4, 2  # of the first phase, one of which is traced, and of later ones
START_SECONDS = 45.0  # imports, weights, the first step's kernels


class Case(NamedTuple):
    """One run: ranks, ZeRO stage, ranks that share a row, tokens of a row by phase, settings.

    A start takes as long as several steps, so a run trains rows of every length in turn.
    """

    ranks: int
    stage: int
    sp: int
    lengths: tuple[int, ...]
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        lengths = "-".join(map(str, self.lengths))
        return f"train-{self.ranks}-zero{self.stage}-sp{self.sp}-{lengths}"

    def words(self, tokens: int) -> str:
        """A phase in words."""
        rows = f"{self.rows} x {tokens:,} tokens"
        return f"{self.ranks} GPU: ZeRO-{self.stage}, {rows}, sp {self.sp}"

    @property
    def rows(self) -> int:
        """Rows of a step: one for each group of ranks that shares rows."""
        return self.ranks // self.sp

    def settings(self, steps: Sequence[int]) -> list[str]:
        """The settings of a run with so many steps in each phase."""
        phases = [
            f"{{steps={number},seq_len={tokens},rows_per_step={self.rows}}}"
            for number, tokens in zip(steps, self.lengths, strict=True)
        ]
        return [
            f"parallel.sp={self.sp}", f"zero.stage={self.stage}", f"train.steps={sum(steps)}",
            f"data.seq_len={self.lengths[-1]}", f"train.rows_per_step={self.rows}",
            f"train.earlier_stages=[{','.join(phases[:-1])}]", *self.more,
        ]  # fmt: skip

    @property
    def fewest(self) -> list[int]:
        """The smallest number of steps of each phase."""
        return [FEWEST_STEPS, *[FEWEST_LATER] * len(self.lengths[1:])]

    @property
    def most(self) -> int:
        """The largest number of steps of a phase."""
        return MOST_STEPS if self.ranks > 1 else MOST_ALONE


def cases(host: Host) -> list[Case]:
    """The runs, most important first; one GPU has as many tokens as each GPU of the others.

    Short rows come first: with fresh weights, long rows are slow (see `efficiency`).
    """
    short, long = host.length(32_768), host.length(131_072)
    if host.ranks == 1:
        return [Case(1, 1, 1, (short,))]
    everyone = host.ranks
    return [
        Case(1, 1, 1, tuple(sorted({short, long // everyone}))),
        Case(everyone, 1, 1, (short, long)),
        Case(everyone, 3, everyone, (short, long)),
        Case(everyone, 3, 1, (short,)),
        Case(everyone, 1, everyone, (short, long)),
    ]


def measure(host: Host) -> Iterator[Row]:
    """Run every case for which time is left; its number of steps follows the time."""
    todo = cases(host)
    seconds = [[row["predicted s"] or 0.0 for row in predict(host, case)] for case in todo]
    alone: dict[int, list[float]] = {}  # step seconds on one GPU, by its tokens
    for number, case in enumerate(todo):
        steps = share_out(host.seconds_left, todo[number:], seconds[number:])[0]
        if not steps:
            yield {"run": case.words(case.lengths[-1]), "exit": "not run: too little time left"}
            continue
        rows = run_case(host, case, steps)
        phases = split(read_metrics(host.folder / case.name), steps)
        for index, (tokens, row) in enumerate(zip(case.lengths, rows, strict=True)):
            own = [
                step_seconds(record) for record in timed(phases[index], steps[index], index == 0)
            ]
            if case.ranks == 1:
                alone[tokens] = own
            yield row | {"vs 1 GPU": efficiency(own, alone.get(tokens // case.sp, []))}


def efficiency(own: list[float], alone: list[float]) -> float | None:
    """Seconds on one GPU per second here, of the same steps; None without such steps.

    With fresh weights, neighboring tokens choose more similar blocks from step to step, so that
    later steps of routed layers are faster.
    """
    shared = min(len(own), len(alone))
    return statistics.median(alone[:shared]) / statistics.median(own[:shared]) if shared else None


def timed(records: list[Row], steps: int, is_traced: bool) -> list[Row]:
    """The records of a phase without its first step, nor its last one if that is traced."""
    return records[1 : steps - 1 if is_traced else steps]


def step_seconds(record: Row) -> float:
    """Seconds of a step; its speed counts the tokens that are predicted."""
    return float(record["data/labels"] / record["perf/tokens_per_second"])


def run_case(host: Host, case: Case, steps: Sequence[int], launcher: str = "") -> list[Row]:
    """Train `steps` steps of each phase, and describe each; the first one's last is traced.

    Without `launcher`, `deepspeed` starts stage 3 and `torchrun` the others.
    """
    settings = host.settings(case.name, *case.settings(steps))
    if steps[0] > 1:
        settings.append(f"train.profile=[{steps[0]},{steps[0] + 1}]")
    launcher = launcher or ("deepspeed" if case.stage == 3 else "torchrun")
    ended = train(host, launcher, case.ranks, case.name, settings)
    rows = zip(describe(host, case, ended, steps), predict(host, case), strict=True)
    return [measured | predicted for measured, predicted in rows]


def share_out(
    seconds: float, todo: Sequence[Case], step_seconds: Sequence[Sequence[float]]
) -> list[list[int]]:
    """Steps of each phase of every case; none for cases that `seconds` do not suffice for.

    First, cases get their fewest steps, in order. What is left goes to first phases, in order, and
    then to later phases.
    """
    plan: list[list[int]] = []
    for case, each in zip(todo, step_seconds, strict=True):
        needed = START_SECONDS + sum(map(operator.mul, case.fewest, each))
        fits = needed <= seconds
        plan.append(case.fewest if fits else [])
        seconds -= needed if fits else 0.0
    runs = [run for run in zip(plan, todo, step_seconds, strict=True) if run[0]]
    for phase in range(max((len(steps) for steps in plan), default=0)):
        for steps, case, each in runs:
            if phase < len(steps) and each[phase]:
                more = min(case.most - steps[phase], int(seconds / each[phase]))
                steps[phase] += more
                seconds -= more * each[phase]
    return plan


def predict(host: Host, case: Case) -> list[Row]:
    """What the plan predicts for each phase; memory is the peak of the run so far."""
    config = host.config(host.settings(case.name, *case.settings(case.fewest)))
    sheet, peak, rows = host.sheet, 0, []
    for job in plan_jobs(config, case.ranks, CUDA):
        peak = max(peak, gpu_memory(job).allocated)
        seconds = step_time(job, sheet).seconds if sheet else None
        rows.append({"predicted GiB": peak / GIB, "predicted s": seconds})
    return rows


def describe(host: Host, case: Case, ended: Ended, steps: Sequence[int]) -> list[Row]:
    """One row of the table for each phase.

    Medians leave out a phase's first step, and the traced one.
    """
    records = read_metrics(host.folder / case.name)
    exchanges = read_exchanges(host.folder / case.name)
    start = ended.seconds - sum(map(step_seconds, records))
    phases = zip(case.lengths, steps, split(records, steps), strict=True)
    return [
        describe_phase(case, tokens, number, phase, index == 0)
        | {
            "exchanges: zero": exchanges.zero if exchanges and index == 0 else None,
            "rows": exchanges.rows if exchanges and index == 0 else None,
            "exposed": exchanges.exposed if exchanges and index == 0 else None,
            "start s": start,
            "exit": ended.outcome,
        }
        for index, (tokens, number, phase) in enumerate(phases)
    ]


def split(records: list[Row], steps: Sequence[int]) -> list[list[Row]]:
    """The records of each phase."""
    ends = list(itertools.accumulate(steps))
    return [records[end - number : end] for end, number in zip(ends, steps, strict=True)]


def describe_phase(case: Case, tokens: int, steps: int, records: list[Row], is_traced: bool) -> Row:
    """The part of a row that comes from one phase's records."""
    known = timed(records, steps, is_traced) or records
    speed, mfu = (
        statistics.median(record[f"perf/{key}"] for record in known) if known else None
        for key in ("tokens_per_second", "mfu")
    )
    losses = [record["train/loss"] for record in records]
    return {
        "run": case.words(tokens),
        "steps": f"{len(records)} of {steps}",
        "loss": f"{losses[0]:.3f} -> {losses[-1]:.3f}" if losses else None,
        "s/step": statistics.median(map(step_seconds, known)) if known else None,
        "tokens/s/GPU": speed / case.ranks if speed else None,
        "MFU": mfu,
        "GiB": records[-1]["perf/memory_gib"] if records else None,
    }
