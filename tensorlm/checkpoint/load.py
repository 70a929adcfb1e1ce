"""Reading a checkpoint: find one that verifies, and fill slices or a model from it."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from tensorlm.runtime.errors import UserError
from tensorlm.runtime.ranks import gather_json

from .manifest import Checkpoint, list_steps, open_checkpoint, step_folder
from .publish import LEDGER, has_trained, was_imported
from .slices import STATE, ParameterSlice

_SHOWN_STEPS = 8  # steps to list if the requested one does not exist
_STALE_SECONDS = 90.0  # NFS may show a folder as it was a minute ago


def newest_checkpoint(
    run_dir: Path,
    rank: int = 0,
    world_size: int = 1,
    *,
    before: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Checkpoint | None:
    """The newest intact checkpoint (older than step `before`); None if the run has none.

    Collective if `world_size` > 1: rank 0 lists the folder, and each rank verifies its share of the
    files.

    Raises:
        UserError: the run has or had checkpoints, and none is intact. A run never silently restarts
            from scratch or from its imported weights, and a replay of a run that began with
            imported weights never begins with random ones.
    """
    steps = [s for s in list_steps(run_dir) if before is None or s < before]
    if before is None and has_trained(run_dir):
        steps = [s for s in steps if s > 0]
    had_some = (run_dir / LEDGER).exists() if before is None else was_imported(run_dir)
    if world_size > 1:
        steps, had_some = gather_json([steps, had_some])[0]
    reasons = []
    for step in steps:
        folder = step_folder(run_dir, step)
        try:
            return _verify(folder, rank, world_size, progress)
        except UserError as error:
            reasons.append(f"{folder.name}: {error.problems[0].removeprefix(f'{folder}/')}")
        if rank == 0:
            print(f"skipping checkpoint: {reasons[-1]}", flush=True)
    if reasons:
        raise UserError(
            f"{run_dir}: no checkpoint is intact ({'; '.join(reasons[:3])}) "
            "(restore one, or choose a new run.dir)"
        )
    if had_some:
        raise UserError(
            f"{run_dir}: the checkpoints listed in {LEDGER} are missing "
            "(restore one, or choose a new run.dir)"
            if before is None
            else f"--replay: no checkpoint before step {before} is left, and the run began with "
            "imported weights (import them into another run.dir and train again)"
        )
    return None


def select_checkpoint(
    run_dir: Path, step: int | None, rank: int = 0, world_size: int = 1
) -> Checkpoint:
    """The verified checkpoint of `step`, or the newest intact one.

    Collective if `world_size` > 1: each rank verifies its share of the files.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    if step is not None:
        steps = list_steps(run_dir)
        if world_size > 1:
            steps = gather_json(steps)[0]
        if step not in steps:
            shown = ", ".join(map(str, steps[:_SHOWN_STEPS]))
            if len(steps) > _SHOWN_STEPS:
                shown += ", ..."
            fix = f"choose one of {shown}" if steps else "train first, or set run.dir"
            raise UserError(f"{run_dir}: no checkpoint of step {step} ({fix})")
        return _verify(step_folder(run_dir, step), rank, world_size)
    newest = newest_checkpoint(run_dir, rank, world_size)
    if newest is None:
        raise UserError(f"{run_dir}: no checkpoint (train first, or set run.dir)")
    return newest


def _verify(
    folder: Path, rank: int, world_size: int, progress: Callable[[], None] = lambda: None
) -> Checkpoint:
    """Open and verify the checkpoint in `folder`: rank 0 opens it first, then each rank its share.

    Raises:
        UserError: on all ranks, with the problems found by any of them.
    """
    share = gather_json if world_size > 1 else lambda problems: [problems]
    checkpoint, problems = _open(folder, rank, progress) if rank == 0 else (None, [])
    problems = share(problems)[0]
    if not problems:
        if rank > 0:
            checkpoint, problems = _open(folder, rank, progress)
        if checkpoint is not None:
            bad = checkpoint.bad_files(rank, world_size, progress)
            problems = [f"{folder}/{problem}" for problem in bad]
        problems = [problem for part in share(problems) for problem in part]
    if problems or checkpoint is None:
        raise UserError(*problems)
    return checkpoint


def _open(
    folder: Path, rank: int, progress: Callable[[], None]
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint, or its problems. Ranks above 0 know that it exists, and wait for it."""
    deadline = time.monotonic() + (_STALE_SECONDS if rank else 0)
    while True:
        try:
            return open_checkpoint(folder), []
        except UserError as error:
            if time.monotonic() >= deadline:
                whose = f"rank {rank}: " if rank else ""
                return None, [f"{whose}{problem}" for problem in error.problems]
        progress()
        time.sleep(0.5)


def load_slices(checkpoint: Checkpoint, slices: Iterable[ParameterSlice]) -> None:
    """Fill this rank's slices from a checkpoint; `Engine.refresh_weights` must follow.

    Raises:
        UserError: names or shapes are not those of this model.
    """
    shapes, has_moments = checkpoint.shapes, checkpoint.manifest.get("adam_state", True)
    for piece in slices:
        _check_shape(checkpoint, piece.name, piece.shape, shapes)
        for key in STATE if has_moments else ("master",):  # imported weights have none
            piece.state[key].copy_(checkpoint.read(piece.name, key, piece.start, piece.stop))


def _check_shape(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], found: dict[str, tuple[int, ...]]
) -> None:
    if found.get(name) != tuple(shape):
        raise UserError(
            f"{checkpoint.folder}: {name} must have the model's shape {tuple(shape)}, got "
            f"{found.get(name) or 'no such parameter'}"
        )


def check_names(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Check that every parameter of a checkpoint is among the model's `names`.

    Raises:
        UserError: one is not; the message names it.
    """
    strange = sorted(checkpoint.shapes.keys() - set(names))
    if strange:
        raise UserError(
            f"{checkpoint.folder}: contains {strange[0]}, which the model does not have"
        )


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copy a checkpoint's fp32 weights into a model without an engine, in one process.

    Raises:
        UserError: names or shapes are not those of this model.
    """
    check_names(checkpoint, (name for name, _ in model.named_parameters()))
    shapes = checkpoint.shapes
    for name, parameter in model.named_parameters():
        _check_shape(checkpoint, name, parameter.shape, shapes)
        with torch.no_grad():
            parameter.copy_(checkpoint.read_parameter(name))
