"""Checks of a run without a process group, for login nodes and the first lines of job logs."""

import contextlib
import hashlib
from pathlib import Path

from tensorlm import checkpoint
from tensorlm.config import Config, config_toml
from tensorlm.data.loader import open_rows
from tensorlm.runtime.commit import git_commit
from tensorlm.runtime.errors import UserError


def check_run(config: Config, num_ranks: int) -> list[str]:
    """Check that `num_ranks` ranks could start this run; returns lines `key = value` about it.

    `config` is a hash of all settings, defaults included. Checksums of the data and of the newest
    checkpoint are not verified; the run itself does that.

    Raises:
        UserError: sizes do not fit the ranks, the data cannot be used, or the newest checkpoint
            belongs to another run.
    """
    config.check_world(num_ranks)
    rows = open_rows(config, "train")
    if config.eval.every:
        from tensorlm.evaluation.launch import check_held_out  # imports transformers

        check_held_out(config)
    run_dir = Path(config.run.dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run.dir: must be a folder, got the file {run_dir}")
    newest = _newest(run_dir)
    if newest:
        checkpoint.check_resumable(newest, config, rows.fingerprint)
    sp, end = config.parallel.sp, config.train.stop_at or config.train.steps
    return [
        f"run.dir = {config.run.dir}",
        f"start = {f'after step {newest.step}' if newest else 'from scratch'}, "
        f"of {config.train.steps} steps",
        f"end = {f'checkpoint {end}' if config.checkpoint.every else f'step {end}, not saved'}",
        f"commit = {git_commit()}",
        f"config = {hashlib.sha256(config_toml(config).encode()).hexdigest()[:12]}",
        f"data = {', '.join(source.path for source in config.data.all_sources)}",
        f"ranks = {num_ranks} (dp {num_ranks // sp} x sp {sp})",
    ]


def _newest(run_dir: Path) -> checkpoint.Checkpoint | None:
    """The newest checkpoint with a valid manifest; the run skips the others too."""
    for step in checkpoint.list_steps(run_dir):
        with contextlib.suppress(UserError):
            return checkpoint.open_checkpoint(checkpoint.step_folder(run_dir, step))
    return None
