"""Computing one step of a run again: was it the data, or the machine?"""

import tomllib
from pathlib import Path

from tensorlm.checkpoint.publish import was_imported
from tensorlm.config import Config
from tensorlm.runtime.errors import EXIT_DONE, UserError
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.ranks import leave_distributed
from tensorlm.runtime.strict_json import json_text

from .loop import start
from .metrics import SETTINGS, read_metrics
from .step import last_rows, train_step


def replay(config: Config, launch: LaunchEnv, step: int) -> int:
    """Compute step `step` again, from the newest checkpoint before it, and print what it gives.

    Writes nothing. On the ranks and machine kind of the run, a loss other than the recorded one
    means that the hardware, not the data, was at fault.

    Raises:
        UserError: there is no such step, or what `start` raises.
    """
    if not 1 <= step <= config.train.steps:
        raise UserError(f"--replay: {step} is no step (they count from 1 to {config.train.steps})")
    run = start(config, launch, before=step)
    if launch.rank == 0:
        has_checkpoint = run.state.step or was_imported(run.dir)
        begin = f"checkpoint {run.state.step}" if has_checkpoint else "scratch"
        print(f"replay of step {step}: from {begin}", flush=True)
        if changed := changed_settings(config):
            print(f"note: {', '.join(changed)}: not as when the run was last started", flush=True)
    while run.state.step < step:
        record, _ = train_step(run, must_stop=False)
    if launch.rank == 0:
        recorded = [r for r in read_metrics(run.dir) if r["step"] == step]
        print(json_text({"step": step, **record}))
        print(f"documents: {', '.join(run.rows.documents(last_rows(run)))}")
        for key in ("train/loss", "train/grad_norm") if recorded else ():
            now, then = json_text(record[key]), json_text(recorded[-1][key])
            print(f"{key}: {now}, then {then}: {'as recorded' if now == then else 'DIFFERS'}")
    leave_distributed()
    run.guards.watchdog.stop()
    return EXIT_DONE


def changed_settings(config: Config) -> list[str]:
    """Keys whose values are not those that the run left in its folder; none if it left nothing."""
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
