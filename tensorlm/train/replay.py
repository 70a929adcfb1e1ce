"""Repeating one step of a run, to find out whether the data or the machine caused a result."""

import tomllib
from pathlib import Path

from tensorlm.checkpoint.publish import was_imported
from tensorlm.config import SETTINGS, Config
from tensorlm.runtime.errors import EXIT_DONE, UserError
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.ranks import leave_distributed
from tensorlm.runtime.strict_json import json_text

from .loop import start
from .metrics import read_metrics
from .step import last_rows, train_step


def replay(config: Config, launch: LaunchEnv, step: int) -> int:
    """Repeat step `step` from the newest checkpoint before it, and print the result.

    Writes nothing. With the same number of ranks and the same kind of machine, a loss that differs
    from the recorded one means that the hardware, not the data, was at fault.

    Raises:
        UserError: there is no such step, or the run cannot start (`start`).
    """
    if not 1 <= step <= config.train.steps:
        raise UserError(
            f"--replay: must be from 1 to train.steps = {config.train.steps}, got {step}"
        )
    run = start(config, launch, before=step)
    if launch.rank == 0:
        has_checkpoint = run.state.step or was_imported(run.dir)
        begin = f"checkpoint {run.state.step}" if has_checkpoint else "scratch"
        print(f"replay of step {step}: from {begin}", flush=True)
        if changed := changed_settings(config):
            print(f"note: changed since the run was last started: {', '.join(changed)}", flush=True)
    while run.state.step < step:
        record, _ = train_step(run, must_stop=False)
    if launch.rank == 0:
        recorded = [r for r in read_metrics(run.dir) if r["step"] == step]
        print(json_text({"step": step, **record}))
        print(f"documents: {', '.join(run.rows.documents(last_rows(run)))}")
        for key in ("train/loss", "train/grad_norm") if recorded else ():
            now, then = json_text(record[key]), json_text(recorded[-1][key])
            print(f"{key}: {now}, recorded {then}: {'equal' if now == then else 'DIFFERENT'}")
    leave_distributed()
    run.guards.watchdog.stop()
    return EXIT_DONE


def changed_settings(config: Config) -> list[str]:
    """Keys whose values differ from the settings in the run's folder; empty without such a file."""
    path = Path(config.run.dir) / SETTINGS
    if not path.exists():
        return []
    now, then = config.model_dump(mode="json", exclude_none=True), tomllib.loads(path.read_text())
    return [
        f"{section}.{key}"
        for section in now
        for key in sorted(now[section].keys() | then.get(section, {}).keys())
        if now[section].get(key) != then.get(section, {}).get(key)
    ]
