"""A routed model is read with a larger stretch than it was trained with, to reach farther."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fold_parallel import Grid
from tensorlm.checkpoint import check_resumable, select_checkpoint
from tensorlm.config import Config, load_config
from tensorlm.evaluation.model import open_checkpoint_model, open_hugging_face_model
from tensorlm.model import Llama
from tensorlm.runtime.errors import UserError
from tests.evaluation.solver import save_untrained
from tests.support.hf_models import launcher_here
from tests.support.launching import TINY

HERE = (torch.device("cpu"), Grid())
ROUTED = [
    "model.fold=[]", "model.window=16", "model.init_std=0.3", "train.dtype=fp32",
    "model.route={block=8, top_k=2, stretch=2, open_tile=4}",
]  # fmt: skip


def settings(tmp_path: Path, data: Path, *overrides: str) -> tuple[list[str], Config]:
    """Arguments of a launcher, and the configuration that they give."""
    file = tmp_path / "config.toml"
    file.write_text(TINY.format(run=tmp_path / "run", data=data))
    return ["--config", str(file), *ROUTED, *overrides], load_config(file, [*ROUTED, *overrides])


def test_evaluation_and_export_take_the_stretch_of_the_configuration(
    tmp_path: Path, data: Path
) -> None:
    _, trained = settings(tmp_path, data)
    arguments, longer = settings(tmp_path, data, "model.route.stretch=8")
    save_untrained(trained)
    before, found = (open_checkpoint_model(config, 0, *HERE) for config in (trained, longer))
    expected = Llama(longer.model)
    expected.load_state_dict(before.network.state_dict())
    tokens = torch.randint(3, 500, (1, 129), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = expected(tokens[:, :-1], None, tokens[:, 1:], "none").numpy()
    np.testing.assert_array_equal(found.losses(tokens), losses)
    assert np.abs(before.losses(tokens) - losses).max() > 0.01
    export = ["export", *arguments, "--output", str(tmp_path / "hf"), "--dtype", "fp32"]
    assert launcher_here("convert.py", *export) == 0
    folder = open_hugging_face_model(longer, tmp_path / "hf", *HERE)
    np.testing.assert_allclose(folder.losses(tokens), losses, rtol=1e-4)


def test_only_the_stretch_may_differ_and_only_to_read(tmp_path: Path, data: Path) -> None:
    _, trained = settings(tmp_path, data)
    save_untrained(trained)
    _, other = settings(tmp_path, data, "model.route.stretch=8", "model.route.top_k=3")
    with pytest.raises(UserError) as refused:
        open_checkpoint_model(other, 0, *HERE)
    (line,) = refused.value.problems
    assert "model.route.top_k: must be 2, as in the checkpoint, got 3 (restore it)" in line
    _, longer = settings(tmp_path, data, "model.route.stretch=8")
    with pytest.raises(UserError, match=r"model\.route\.stretch: must be 2, as in the checkpoint"):
        check_resumable(select_checkpoint(Path(longer.run.dir), 0), longer, "")
    window = load_config(tmp_path / "config.toml", ROUTED[:-1])
    with pytest.raises(UserError, match=r"model\.route\.block: must be 8, as in the checkpoint"):
        open_checkpoint_model(window, 0, *HERE)
