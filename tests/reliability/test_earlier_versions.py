"""What an earlier version wrote is read by this one: data, a checkpoint, an exported folder.

`version_0.1.0.zip` was written by tensorlm 0.1.0 (commit 999789c): a run of 2 ranks under ZeRO 2
that stopped after step 2 of 4, and its export with code and float32 weights. `expected.json` has
what that version computed from them: losses and data hashes of the next steps, and the logits of
the last of 40 tokens.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tensorlm.checkpoint import newest_checkpoint
from tensorlm.config import Config, load_config
from tensorlm.hf.import_folder import import_weights
from tensorlm.train.metrics import read_metrics
from tests.reliability.harness import Job, warm_up


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))  # folders' code is copied there
    shutil.unpack_archive(Path(__file__).with_name("version_0.1.0.zip"), tmp_path / "old")
    return tmp_path / "old"


def settings(old: Path, run: str = "run") -> Config:
    return load_config(old / "config.toml", [f"run.dir={old / run}", f"data.path={old / 'data'}"])


def expected(old: Path) -> dict[str, Any]:
    return dict(json.loads((old / "expected.json").read_text()))


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_continues_from_its_checkpoint(old: Path, world: int) -> None:
    warm_up()
    job = Job(settings(old), world)
    assert job.wait() == [0] * world, job.output()
    assert "resumed after step 2" in job.output()
    records = {str(r["step"]): r for r in read_metrics(old / "run")}
    assert list(records) == ["1", "2", "3", "4"]
    for step, data_hash in expected(old)["data"].items():
        assert records[step]["data/hash"] == data_hash
    # Rotary angles were rounded to float32 before they were multiplied.
    for step, loss in expected(old)["losses"].items():
        assert math.isclose(records[step]["train/loss"], loss, rel_tol=1e-6), step


def test_an_exported_folder_computes_what_it_did(old: Path) -> None:
    """Its own code calls the operators that are installed."""
    model = AutoModelForCausalLM.from_pretrained(old / "hf", trust_remote_code=True)
    tokens = torch.arange(40)[None] * 7 % 29 + 3
    with torch.no_grad():
        logits = model(tokens).logits
        cached = model.generate(
            tokens[:, :30], max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
    torch.testing.assert_close(
        logits[0, -1], torch.tensor(expected(old)["logits"]), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(cached.logits[0][0], logits[0, 29], rtol=0, atol=1e-5)


def test_an_exported_folder_is_imported(old: Path) -> None:
    config = settings(old, "imported")
    import_weights(old / "hf", config)
    imported, trained = (newest_checkpoint(old / run) for run in ("imported", "run"))
    assert imported is not None
    assert trained is not None
    assert imported.shapes == trained.shapes
    for name, shape in trained.shapes.items():
        ours, theirs = (c.read(name, "master", 0, math.prod(shape)) for c in (imported, trained))
        assert torch.equal(ours, theirs), name
