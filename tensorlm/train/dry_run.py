"""What a run would do, found out without a process group: for login nodes and heads of job logs."""

import contextlib
import hashlib
from pathlib import Path

from tensorlm.checkpoint import (
    Checkpoint,
    check_resumable,
    list_steps,
    open_checkpoint,
    step_folder,
)
from tensorlm.config import Config, config_toml
from tensorlm.data.loader import open_rows
from tensorlm.runtime.commit import git_commit
from tensorlm.runtime.errors import UserError


def check_run(config: Config, num_ranks: int) -> list[str]:
    """Check that `num_ranks` ranks could start this run; returns one `key = value` line per fact.

    The hash is of all settings together, defaults included. Whether every byte of data and newest
    checkpoint is whole is left to the run itself.

    Raises:
        UserError: sizes that do not fit the ranks, data that cannot be used, or a newest checkpoint
            of another run.
    """
    config.check_world(num_ranks)
    rows = open_rows(config, "train", verify=False)
    if config.eval.every:
        from tensorlm.evaluation.launch import check_held_out  # imports transformers

        check_held_out(config)
    run_dir = Path(config.run.dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run.dir: {run_dir} is not a directory")
    newest = _newest(run_dir)
    if newest:
        check_resumable(newest, config, rows.fingerprint)
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


def _newest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint with a good manifest; the run passes the others over, too."""
    for step in list_steps(run_dir):
        with contextlib.suppress(UserError):
            return open_checkpoint(step_folder(run_dir, step))
    return None
