"""`benchmark.py node`: a run of a tiny model, its table, and what a signal leaves."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tensorlm.benchmarks.node.evaluation import describe
from tensorlm.benchmarks.node.host import Host
from tensorlm.benchmarks.node.launch import Ended, launcher_command
from tensorlm.benchmarks.node.longest import why_not
from tensorlm.benchmarks.node.trace import Exchanges, read_exchanges, summarize, which
from tensorlm.benchmarks.node.training import (
    FEWEST_STEPS,
    START_SECONDS,
    Case,
    cases,
    describe_phase,
    efficiency,
    share_out,
    split,
)
from tensorlm.data.prepare.resume import output_locked
from tests.support.launching import ROOT, launch_environment

GIB = 2**30


def host(folder: Path, ranks: int, memory: float = 256 * GIB, tiny: bool = False) -> Host:
    return Host(folder, ranks, 600.0, memory, tiny)


def test_stopped_command_reports_what_it_has_measured(tmp_path: Path) -> None:
    file = tmp_path / "node.json"
    command = [
        sys.executable, "launcher/benchmark.py", "node", "--tiny", "--ranks", "1", "--parts",
        "train,starters", "--folder", str(tmp_path / "node"), "--json", str(file),
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, env=launch_environment(), text=True, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("## starters"):
                started = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 0, lines
    assert psutil.wait_procs(started, 5)[1] == []
    rows = json.loads(file.read_text())["rows"]
    [trained] = rows["train"]
    assert trained["exit"] == "0"
    assert trained["steps"] == f"{FEWEST_STEPS} of {FEWEST_STEPS}"
    assert trained["vs 1 GPU"] == 1.0
    assert rows["starters"] == [] or rows["starters"][0]["exit"] == "out of time"
    head = next(line for line in lines if line.startswith("| run "))
    assert [cell.strip() for cell in head.split("|")[1:-1]] == list(trained)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_case_is_a_legal_run(tmp_path: Path, ranks: int) -> None:
    here = host(tmp_path, ranks)
    for case in cases(here):
        settings = here.settings(case.name, *case.settings(case.fewest))
        here.config(settings).check_ranks(case.ranks)
    assert [case.ranks for case in cases(here)].count(1) == 1


def test_number_of_steps_follows_the_time() -> None:
    todo = [Case(1, 1, 1, (1, 2)), Case(2, 1, 1, (1, 4)), Case(2, 3, 2, (4,))]
    each = [[4.0, 8.0], [4.0, 16.0], [8.0]]
    fewest = [[4, 2], [4, 2], [4]]
    start = START_SECONDS
    needed = [start + 32, start + 48, start + 32]
    assert share_out(0, todo, each) == [[], [], []]
    assert share_out(needed[0] + 39, todo, each) == [[6, 5], [], []]
    # a case that does not fit leaves its time to later ones
    assert share_out(needed[0] + needed[2], todo, each) == [[4, 2], [], [4]]
    assert share_out(sum(needed), todo, each) == fewest
    # first phases first, in order: 2 steps more alone, and 3 on two GPUs
    assert share_out(sum(needed) + 2 * 4 + 3 * 4, todo, each) == [[6, 2], [7, 2], [4]]
    assert share_out(10_000, todo, each) == [[6, 6], [20, 20], [20]]
    assert share_out(10_000, todo[:1], [[0.0, 0.0]]) == [[4, 2]]  # unknown


def test_finished_data_is_used_while_another_call_holds_it(tmp_path: Path) -> None:
    here = host(tmp_path, 1, tiny=True)
    (tmp_path / "data.complete").touch()
    with output_locked(tmp_path / "data"):
        here.prepare_data()
    assert not (tmp_path / "texts.jsonl").exists()


def test_phases_are_described_apart() -> None:
    case = Case(2, 1, 1, (10, 40))
    rows = [{"step": step} for step in range(1, 6)]
    assert split(rows, [3, 4]) == [rows[:3], rows[3:]]

    def record(speed: float, memory: float) -> dict[str, float]:
        return {"perf/tokens_per_second": speed, "perf/mfu": 0.5, "perf/memory_gib": memory,
                "train/loss": speed, "data/labels": 20.0}  # fmt: skip

    records = [record(1.0, 7.0), record(10.0, 8.0), record(20.0, 8.0), record(2.0, 9.0)]
    traced = describe_phase(case, 10, 4, records, is_traced=True)
    assert (traced["s/step"], traced["GiB"], traced["tokens/s/GPU"]) == (1.5, 9.0, 7.5)
    other = describe_phase(case, 40, 4, records, is_traced=False)
    assert (other["tokens/s/GPU"], other["steps"]) == (5.0, "4 of 4")
    assert other["loss"] == "1.000 -> 2.000"
    assert describe_phase(case, 40, 4, [], is_traced=False)["s/step"] is None


def test_efficiency_compares_the_same_steps() -> None:
    assert efficiency([4.0, 5.0, 1.0, 1.0], [6.0, 6.0]) == 6.0 / 4.5
    assert efficiency([4.0], []) is None


def test_longest_row_is_rejected_for_lack_of_memory(tmp_path: Path) -> None:
    case = Case(2, 3, 2, (1_048_576,), ("train.activation_offload=true", "model.route.stretch=128"))
    assert why_not(host(tmp_path, 2), case) == "needs 264 GiB of host memory, of 256"
    assert why_not(host(tmp_path, 2, 300 * GIB), case) is None
    halved = case._replace(more=(*case.more, "train.recompute_interval=2"))
    assert why_not(host(tmp_path, 2, 140 * GIB), halved) is None


def test_exchanges_are_told_apart_and_overlap_is_not_exposed() -> None:
    kernels = [
        ("compute", 0.0, 40.0), ("rows", 30.0, 50.0), ("zero", 60.0, 80.0),
        ("compute", 70.0, 100.0),
    ]  # fmt: skip
    assert summarize(kernels) == Exchanges(zero=0.2, rows=0.2, exposed=0.2)
    assert summarize([]) is None


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("gemm", None, "compute"),
        ("ncclDevKernel_SendRecv(x)", "Byte", "rows"),
        ("ncclDevKernel_AllGather_RING_LL(x)", "Byte", "rows"),
        ("ncclDevKernel_AllGather_RING_LL(x)", "BFloat16", "zero"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", None, "zero"),
    ],
)
def test_gathers_of_rows_are_not_those_of_zero(name: str, dtype: str | None, kind: str) -> None:
    assert which({"name": name, "args": {"dtype": dtype} if dtype else {}}) == kind


def test_launchers_keep_to_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    command = launcher_command("deepspeed", 2)
    assert command is not None
    assert command[command.index("--include") + 1] == "localhost:4,5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    command = launcher_command("deepspeed", 2)
    assert command is not None
    assert command[command.index("--num_gpus") + 1] == "2"


def test_no_trace_or_half_a_trace_has_no_exchanges(tmp_path: Path) -> None:
    assert read_exchanges(tmp_path) is None
    (tmp_path / "profile").mkdir()
    trace = tmp_path / "profile/a.pt.trace.json"
    kernel = {"cat": "kernel", "name": "gemm", "ts": 1.0, "dur": 2.0}
    trace.write_text(json.dumps({"traceEvents": [kernel, {"ph": "M"}]}))
    assert read_exchanges(tmp_path) == Exchanges(0.0, 0.0, 0.0)
    trace.write_text(trace.read_text()[:-3])
    assert read_exchanges(tmp_path) is None


@pytest.mark.parametrize(
    ("output", "result"),
    [
        ("Perplexity\nlength  loss\n 2,048  8.33\nreport: x", "2,048 8.33"),
        ("note\nexported to  x", "exported to x"),
        ("length ", "length"),
        ("", ""),
    ],
)
def test_result_of_an_evaluation_is_its_first_length_or_the_last_line(
    output: str, result: str
) -> None:
    assert describe("evaluate", 2, Ended(0, 1.0, output))["result"] == result


def test_outcome_is_the_exit_code_with_the_error() -> None:
    assert Ended(0, 1.0, "done").outcome == "0"
    assert Ended(2, 1.0, "a\nerror: x: y\nTraceback").outcome == "2: error: x: y"
    assert Ended(1, 1.0, "").outcome == "1"
    assert Ended(None, 1.0, "step 1").outcome == "out of time"
