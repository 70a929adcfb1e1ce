"""A run reduced to its saves: two parameters whose values tell the step and key they belong to."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from tensorlm.checkpoint import STATE, Checkpoint, ParameterSlice, Saver, newest_checkpoint
from tensorlm.checkpoint.publish import sweep
from tensorlm.config import Config
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.preemption import StopRequest

SHAPES = {"embedding": (7, 3), "norm": (5,)}
LAST_STEP = 3


def expected(step: int, name: str, key: str) -> torch.Tensor:
    """The values of one flattened parameter at one step."""
    size = torch.Size(SHAPES[name]).numel()
    return torch.arange(size) + 100.0 * step + 10.0 * STATE.index(key)


def slices(step: int, rank: int, world: int) -> Iterator[ParameterSlice]:
    """This rank's share of each parameter."""
    for name, shape in SHAPES.items():
        size = torch.Size(shape).numel()
        start, stop = rank * size // world, (rank + 1) * size // world
        state = {key: expected(step, name, key)[start:stop] for key in STATE}
        yield ParameterSlice(name, shape, start, stop, state)


def save_all(config: Config, launch: LaunchEnv, stop: StopRequest) -> int:
    """Saves every step that the run lacks, and writes down which of them `save` has returned from.

    That is a body for `Job`.
    """
    note = Path(config.run.dir).with_name(f"acknowledged-{launch.rank}")
    save_steps(config, launch, lambda step: note.write_text(str(step)))
    dist.barrier()  # where nothing was left to be saved, others may still be connecting
    return 0


def save_steps(config: Config, launch: LaunchEnv, has_returned: Callable[[int], object]) -> None:
    """Saves every step that the run lacks; `has_returned(step)` when it is published."""
    folder = Path(config.run.dir)
    newest = newest_checkpoint(folder, launch.rank, launch.world_size)
    if launch.rank == 0:
        sweep(folder)
    saver = Saver(folder, config.checkpoint)
    for step in range(newest.step + 1 if newest else 1, LAST_STEP + 1):
        saver.save(step, slices(step, launch.rank, launch.world_size), {})
        saver.wait()
        has_returned(step)


def check_newest(folder: Path) -> int:
    """The newest checkpoint that verifies holds exactly its step's values; 0 where there is none.

    It must not be older than one that `save` has returned from, on any rank.
    """
    acknowledged = [int(p.read_text() or 0) for p in folder.parent.glob("acknowledged-*")]
    newest = newest_checkpoint(folder)
    step = newest.step if newest else 0
    assert step >= max(acknowledged, default=0)
    assert newest is None or holds_its_step(newest)
    return step


def holds_its_step(checkpoint: Checkpoint) -> bool:
    """Every value is that of the step that the checkpoint claims to be of."""
    return all(
        torch.equal(
            checkpoint.read(name, key, 0, torch.Size(shape).numel()),
            expected(checkpoint.step, name, key),
        )
        for name, shape in SHAPES.items()
        for key in STATE
    )
