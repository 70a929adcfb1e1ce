"""What a run would do, found out without a process group: for login nodes and heads of job logs."""

import hashlib
from pathlib import Path

from .config import Config, config_toml
from .data.loader import open_rows
from .manifest import list_steps
from .metrics import git_commit


def check_run(config: Config, num_ranks: int) -> list[str]:
    """Check that `num_ranks` ranks could start this run; returns one `key = value` line per fact.

    The hash is of all settings together, defaults included. That the newest checkpoint is whole is
    left to the run itself, which reads it in parallel.

    Raises:
        UserError: sizes that do not fit the ranks, or data that cannot be used.
    """
    config.check_world(num_ranks)
    rows = open_rows(config, "train")
    steps = list_steps(Path(config.run.dir))
    sp = config.parallel.sp
    return [
        f"run.dir = {config.run.dir}",
        f"start = {f'after step {steps[0]}' if steps else 'from scratch'}, "
        f"of {config.train.steps} steps",
        f"commit = {git_commit()}",
        f"config = {hashlib.sha256(config_toml(config).encode()).hexdigest()[:12]}",
        f"data = {config.data.path}, {rows.plan.num_rows:,} rows of {config.data.seq_len:,} tokens",
        f"ranks = {num_ranks} (dp {num_ranks // sp} x sp {sp}), "
        f"{config.train.rows_per_step} rows a step",
    ]
