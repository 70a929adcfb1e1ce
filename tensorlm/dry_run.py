"""What a run would do, found out without a process group: for login nodes and heads of job logs."""

import hashlib
from pathlib import Path

from .config import Config, config_toml
from .data.loader import open_rows
from .manifest import list_steps
from .metrics import git_commit


def check_run(config: Config, num_ranks: int) -> list[str]:
    """Check that `num_ranks` ranks could start this run; returns one `key = value` line per fact.

    The hash is of all settings together, defaults included. Whether every byte of data and newest
    checkpoint is whole is left to the run itself.

    Raises:
        UserError: sizes that do not fit the ranks, or data that cannot be used.
    """
    config.check_world(num_ranks)
    open_rows(config, "train", verify=False)
    steps = list_steps(Path(config.run.dir))
    sp, end = config.parallel.sp, config.train.stop_at or config.train.steps
    return [
        f"run.dir = {config.run.dir}",
        f"start = {f'after step {steps[0]}' if steps else 'from scratch'}, "
        f"of {config.train.steps} steps",
        f"end = {f'checkpoint {end}' if config.checkpoint.every else f'step {end}, not saved'}",
        f"commit = {git_commit()}",
        f"config = {hashlib.sha256(config_toml(config).encode()).hexdigest()[:12]}",
        f"data = {', '.join(source.path for source in config.data.all_sources)}",
        f"ranks = {num_ranks} (dp {num_ranks // sp} x sp {sp})",
    ]
