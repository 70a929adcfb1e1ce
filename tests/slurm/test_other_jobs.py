"""Conversion, evaluation and data preparation as jobs."""

import email
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tensorlm.evaluation.results import read_report
from tests.slurm.conftest import Site
from tests.support.hf_models import tiny_llama
from tests.support.launching import ROOT, launch_environment

ONE_NODE = "--nodes=1"
REPORT_JOB = re.compile(r"^report = job (\d+)$", re.MULTILINE)


def test_chain_of_import_training_and_evaluation_ends_in_one_table(
    site: Site, tmp_path: Path
) -> None:
    cluster, run = site.cluster, tmp_path / "run"
    site.set_site("export LAUNCHER=srun")
    tiny_llama().save_pretrained(tmp_path / "hf")
    settings = ("--config", str(site.config), f"run.dir={run}")
    evaluation = ("eval.max_tokens=4096", "eval.near=0")

    def after(job: str) -> tuple[str, ...]:
        return (ONE_NODE, f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")

    imported = site.submit(
        "convert.sh", "import", "--hf", str(tmp_path / "hf"), *settings, options=(ONE_NODE,)
    )
    train = ("train.steps=2", "optim.warmup_steps=0")
    two = ("--gpus-per-node=2", "--ntasks-per-node=2")
    trained = site.submit("train_llama8b.sh", *settings, *train, options=(*after(imported), *two))
    # Two tasks for four parts, two of which must fail: there is no checkpoint 7.
    job = site.submit(
        "eval_128k.sh", *settings, "--lengths", "64,256", "--checkpoints", "2,7", "--tasks", "ppl",
        *evaluation, options=(*after(trained), "--array=0-1"),
    )  # fmt: skip
    folder = tmp_path / "exported"
    exported = site.submit(
        "convert.sh", "export", "--output", str(folder), "--dtype=fp32", *settings,
        options=after(trained),
    )  # fmt: skip
    from_folder = site.submit(
        "eval_128k.sh", f"--config={site.config}", f"--hf={folder}", "--lengths=64",
        "--tasks=ppl", f"run.dir={run}", *evaluation, "eval.segment=256",
        options=(*after(exported), "--array=0"),
    )  # fmt: skip
    assert cluster.wait_for(imported) == "COMPLETED", site.log(imported)
    assert cluster.wait_for(trained) == "COMPLETED", site.log(trained)
    assert "start = after step 0, of 2 steps" in site.log(trained).splitlines()
    assert cluster.wait_for(job) == "FAILED"
    logs = [path.read_text() for path in (site.folder / "slurm/logs").glob(f"eval128k-{job}_*")]
    assert len(logs) == 2
    (report_job,) = REPORT_JOB.findall("".join(logs))
    assert cluster.wait_for(report_job) == "FAILED"
    out = run / f"eval/eval128k-{job}"
    for missing in ("7-64", "7-256"):
        assert f"error: {out}/parts/{missing}: report.json is missing" in site.log(report_job)

    parts = {path.name: read_report(path / "report.json") for path in (out / "parts").iterdir()}
    assert sorted(parts) == ["2-256", "2-64"]
    table = (out / "report.md").read_text()
    for part in parts.values():
        assert f"{part.perplexity[0].perplexity:.3f}" in table
    assert (out / "report.html").exists()
    assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG")

    # The same numbers as the exported folder has.
    assert cluster.wait_for(from_folder) == "COMPLETED"
    (log,) = (site.folder / "slurm/logs").glob(f"eval128k-{from_folder}_*")
    (report_job,) = REPORT_JOB.findall(log.read_text())
    assert cluster.wait_for(report_job) == "COMPLETED", site.log(report_job)
    (hf_part,) = (run / f"eval/eval128k-{from_folder}/parts").iterdir()
    found, expected = read_report(hf_part / "report.json"), parts["2-64"]
    assert (hf_part.name, found.name) == ("hf-64", str(folder))
    assert found.perplexity[0].loss == pytest.approx(expected.perplexity[0].loss)

    # The same numbers as one evaluation of both lengths together.
    command = [sys.executable, "launcher/evaluate.py", *settings[:2], "--checkpoint", "2"]
    command += ["--lengths", "64,256", "--tasks", "ppl", "--output", str(tmp_path / "whole")]
    command += [f"run.dir={run}", *evaluation]
    subprocess.run(command, cwd=ROOT, env=launch_environment(), check=True, capture_output=True)
    whole = read_report(tmp_path / "whole/report.json")
    assert [r.loss for r in whole.perplexity] == pytest.approx(
        [parts[f"2-{length}"].perplexity[0].loss for length in (64, 256)], rel=1e-6
    )


def test_data_prepared_on_two_nodes_is_what_one_process_makes(
    site: Site, data: Path, tmp_path: Path
) -> None:
    source = ("--input", str(Path(email.__file__).parent / "*.py"))
    job = site.submit(
        "prepare_data.sh", *source, "--tokenizer", str(data / "tokenizer"), "--holdout", "0.3",
        "--output", str(tmp_path / "set"), options=("--ntasks-per-node=2",),
    )  # fmt: skip
    assert site.cluster.wait_for(job) == "COMPLETED", site.log(job)
    assert "ranks = 4" in site.log(job).splitlines()
    shards = [path.relative_to(data) for path in sorted(data.glob("*/shard-*"))]
    assert shards
    for name in shards:
        assert (tmp_path / "set" / name).read_bytes() == (data / name).read_bytes(), name
