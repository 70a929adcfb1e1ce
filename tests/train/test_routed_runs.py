"""Runs with routed and window layers: resumed = uninterrupted, whatever saves memory."""

from pathlib import Path

import pytest

from tensorlm.checkpoint import newest_checkpoint
from tests.support.launching import TrainRanks, losses

MIXED = [
    "model.fold=[]", "model.window=16", "model.route={block=8, top_k=2, stretch=2}",
    "model.num_layers=3", "model.layers=['window', 'routed', 'full']",
    "train.steps=4", "checkpoint.every=2",
]  # fmt: skip
SAVING = ["train.recompute=block", "train.activation_offload=true"]


def state_hashes(run_dir: Path) -> list[str]:
    found = newest_checkpoint(run_dir)
    assert found is not None
    return [entry["sha256"] for entry in found.manifest["files"]]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, train_ranks: TrainRanks) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    said = train_ranks(*MIXED, f"run.dir={whole}")
    assert "routed (window 16, 2 + 1 blocks of 8, stretch 2)" in said
    for stop in (2, 4):
        train_ranks(*MIXED, f"run.dir={broken}", f"train.stop_at={stop}")
    assert losses(broken) == losses(whole)
    assert state_hashes(broken) == state_hashes(whole)
    assert losses(whole)[-1] < losses(whole)[0]


@pytest.mark.parametrize("stages", [(0, 1), (2, 3)])
def test_other_stages_and_what_saves_memory_have_the_same_losses(
    tmp_path: Path, train_ranks: TrainRanks, stages: tuple[int, int]
) -> None:
    train_ranks(*MIXED, f"run.dir={tmp_path / 'one'}", ranks=1)
    found = newest_checkpoint(tmp_path / "one")
    assert found is not None
    assert found.manifest["state"]["tokens"] < 4 * 4 * 128  # some rows end in padding
    for stage in stages:
        run = tmp_path / str(stage)
        more = ["train.mlp_chunk=48", f"train.recompute_interval={1 + stage % 2}"]
        train_ranks(*MIXED, *SAVING, *more, f"zero.stage={stage}", f"run.dir={run}")
        assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=1e-5), stage
