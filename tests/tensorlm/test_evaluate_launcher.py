"""The evaluation launcher: a report per checkpoint, and lengths that the data cannot give."""

import subprocess
import sys
from pathlib import Path

from tests.tensorlm.launching import ROOT, RunTraining


def test_evaluation_writes_a_report_and_refuses_lengths_without_text(
    tmp_path: Path, config: Path, run_training: RunTraining
) -> None:
    run_training("train.stop_at=2", ranks=1, launcher="python")
    command = [sys.executable, "launcher/evaluate.py", "--config", str(config)]
    result = subprocess.run(
        [*command, "--lengths", "64,128,256"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "perplexity" in result.stdout
    report = tmp_path / "run/eval/step-00000002"
    assert (report / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert (report / "report.json").exists()
    too_long = subprocess.run(
        [*command, "--lengths", "1048576"], cwd=ROOT, capture_output=True, text=True
    )
    assert too_long.returncode == 2
    assert too_long.stderr.splitlines()[-1].startswith("error: eval.lengths: no held-out document")
