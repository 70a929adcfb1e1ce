"""The comparison of predictions with real steps: every point is a line, whatever happens to it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tensorlm.benchmarks import memory_points as bench
from tensorlm.benchmarks.memory import find_sheet
from tensorlm.plan.gpus import GPUS
from tensorlm.plan.job import plan_jobs
from tensorlm.plan.memory import gpu_memory
from tensorlm.runtime.errors import UserError
from tests.support.launching import ROOT, launch_environment

POINTS = """
[[points]]
name = "good"
steps = 2
set = ["zero.stage=1", {tiny}]
[[points]]
name = "absurd"
set = ["zero.stage=1", {tiny}, "model.vocab_size=1000000000000"]
"""


def points_file(folder: Path) -> Path:
    (first, *_) = bench.default_points(on_gpu=False)
    tiny = ", ".join(f'"{setting}"' for setting in first.settings)
    path = folder / "points.toml"
    path.write_text(POINTS.format(tiny=tiny))
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts tensors on the CPU")
def test_each_point_is_measured_and_a_failure_is_one_line(tmp_path: Path) -> None:
    output = tmp_path / "memory.json"
    command = [sys.executable, "launcher/benchmark.py", "memory", "--json", str(output)]
    result = subprocess.run(
        [*command, "--points", str(points_file(tmp_path))],
        cwd=ROOT, env=launch_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    good, absurd = json.loads(output.read_text())  # the largest comes last
    head, rule, *lines = result.stdout.splitlines()
    assert {row.count("|") for row in (head, rule, *lines)} == {8}
    assert good["name"] == "good"
    assert good["numbers"]["device"] == "CPU"
    assert good["numbers"]["predicted"] == pytest.approx(good["numbers"]["allocated"], rel=0.1)
    assert good["numbers"]["seconds"] > 0
    parts = [good["numbers"][key] for key in ("start", "passes", "update")]
    assert good["numbers"]["allocated"] == max(parts)
    assert good["numbers"]["predicted"] == max(good["numbers"]["predicted_phases"].values())
    assert absurd["numbers"] is None
    assert "allocate" in absurd["problem"]
    assert lines[1].startswith("| absurd | ")


def test_time_is_bounded() -> None:
    points = bench.default_points(on_gpu=False)[:2]
    first, second = bench.measure_points(points, seconds=0.5, each=0.2)
    assert first.numbers is second.numbers is None
    assert "took more than 0 s" in first.problem
    (late,) = bench.measure_points(points[:1], seconds=0.0, each=60.0)
    assert late.problem == "not measured: out of time"


def test_default_points_cover_what_a_gpu_can_run() -> None:
    points = bench.default_points(on_gpu=True)
    jobs = [plan_jobs(bench.point_config(point), 1)[-1] for point in points]
    assert len({point.name for point in points}) == len(points) >= 8
    assert {job.zero for job in jobs} == {1, 2, 3}
    assert {job.recomputes for job in jobs} == {True, False}
    assert any(job.offloads_optimizer for job in jobs)
    assert any(job.offloads_activations for job in jobs)
    assert min(job.phase.seq_len for job in jobs) == 8192
    assert max(job.phase.seq_len for job in jobs) == 131072
    assert min(job.parameters for job in jobs) < 0.2e9 < 8e9 < max(job.parameters for job in jobs)
    assert all(gpu_memory(job).needed < GPUS["h200"].memory for job in jobs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("points = 3", "must contain \\[\\[points\\]\\]"),
        ("[[points]]\nnme = 1", "name: missing"),
        ("[[points]]\nname = 'a'\nset = ['model.hidden=1']", "model.hidden: unknown key"),
        ("[[", "not valid TOML"),
    ],
)
def test_bad_points_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "points.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        bench.read_points(path)
    with pytest.raises(UserError, match="cannot be read"):
        bench.read_points(tmp_path / "absent")


def test_devices_have_their_data_sheets() -> None:
    assert find_sheet("NVIDIA H200") == GPUS["h200"]
    assert find_sheet("NVIDIA H100 80GB HBM3") == GPUS["h100"]
    for name in ("GeForce RTX 4090", "H100 PCIe", "H100 NVL", "GB200", "A100-SXM4-40GB MIG 1g.5gb"):
        assert find_sheet(f"NVIDIA {name}") is None


@pytest.mark.gpu
def test_predictions_hold_on_this_gpu(tmp_path: Path) -> None:
    point = bench.default_points(on_gpu=True)[0]
    (outcome,) = bench.measure_points([point], seconds=120, each=120)
    assert outcome.numbers is not None, outcome.problem
    assert outcome.numbers["device"] == torch.cuda.get_device_name()
    assert outcome.numbers["predicted"] == pytest.approx(outcome.numbers["allocated"], rel=0.1)
