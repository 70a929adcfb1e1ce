"""Checkpoints: each rank writes its slices, a manifest seals them, a rename publishes.

A checkpoint is published when all ranks agree that all they wrote is on the disk. There is no
pointer to the newest one: it is the highest step that verifies. `manifest.py` has the format and
how it is read, `publish.py` the order of writing.
"""

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tensorlm.config import CheckpointConfig
from tensorlm.runtime import disk
from tensorlm.runtime.errors import UserError
from tensorlm.train.engine import EXCHANGE_LIMIT, STATE, ParameterSlice

from .manifest import Checkpoint, list_steps, open_checkpoint, step_folder
from .publish import (
    LEDGER,
    describe_os_error,
    has_trained,
    note,
    publish,
    remove,
    start_folder,
    was_imported,
    write_manifest,
    write_safetensors,
)

_Result = TypeVar("_Result")
_SHOWN_STEPS = 8  # where one is asked for that is not there
_STALE_SECONDS = 90.0  # NFS may show a folder as it was a minute ago

# ------------------------------------------------------------------------------------------- write


class Saver:
    """Publishes the checkpoints of one run, all ranks together; at most one is in flight.

    With `config.background`, `save` returns as soon as a copy of the state is taken, and a thread
    writes that copy while training goes on.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        resumed_at: int | None = None,
        progress: Callable[[str], None] = lambda part: None,
    ) -> None:
        """`resumed_at` is the step that the run goes on from, None where that does not matter.
        `progress("save")` is called as bytes are written, "agree" when others are waited for.
        """
        self._run_dir = run_dir
        self._config = config
        self._resumed_at = resumed_at
        self._first_saved: int | None = None
        self._progress = progress
        # Its own, since a background save talks while training does; on the CPU on any machine.
        self._group = dist.new_group(backend="gloo", timeout=EXCHANGE_LIMIT)
        self._rank = dist.get_rank()
        self._copies: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, slices: Iterable[ParameterSlice], info: dict[str, Any]) -> None:
        """Publish the checkpoint of `step` from this rank's slices, then let old ones go.

        Args:
            step: optimizer steps done.
            slices: this rank's slices; those that it does not own are passed over.
            info: plain values for the manifest (state, config, data fingerprint).

        Raises:
            UserError: a rank could not write this one, or the one in flight before it; what was
                published before is untouched.
        """
        started = time.perf_counter()
        self.wait()
        owned = [piece for piece in slices if piece.is_owned]
        layout = {
            "slices": {piece.name: [piece.start, piece.stop] for piece in owned},
            "shapes": {piece.name: list(piece.shape) for piece in owned},
        }
        tensors = {f"{p.name}/{key}": value for p in owned for key, value in p.state.items()}
        if not self._config.background:
            self._publish(step, tensors, layout, info, started, None)
            return
        tensors = {name: self._copy(name, value) for name, value in tensors.items()}
        stall = time.perf_counter() - started

        def work() -> None:
            try:
                self._publish(step, tensors, layout, info, started, stall)
            except BaseException as error:  # whatever it is, `wait` raises it
                self._error = error

        self._thread = Thread(target=work, name=f"save-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is in flight.

        Raises:
            UserError: on every rank, if the save that was in flight failed on any; or whatever kept
                the ranks from telling one another.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    @property
    def has_failed(self) -> bool:
        """The save in flight has failed: `wait` will say how."""
        return self._error is not None

    def _copy(self, name: str, value: Tensor) -> Tensor:
        """The copy of one tensor that the thread writes; its memory is used by every save."""
        if name not in self._copies:
            self._copies[name] = torch.empty(value.shape, dtype=torch.float32)
        return self._copies[name].copy_(value)

    def _publish(
        self,
        step: int,
        tensors: dict[str, Tensor],
        layout: dict[str, Any],
        info: dict[str, Any],
        started: float,
        stall: float | None,
    ) -> None:
        target = step_folder(self._run_dir, step)
        temporary = target.with_name(f".tmp-{target.name}")
        name = f"rank-{self._rank:05d}.safetensors"

        def write_slices() -> dict[str, Any]:
            path = temporary / name
            size, sha256 = write_safetensors(path, tensors, lambda _: self._progress("save"))
            return {"name": name, "bytes": size, "sha256": sha256, **layout}

        def seal() -> None:
            write_manifest(temporary, {"step": step, **info, "files": entries})
            publish(temporary, target)
            seconds = time.perf_counter() - started
            num_bytes, stood_still = sum(e["bytes"] for e in entries), stall or seconds
            note(self._run_dir, step, num_bytes, stood_still, seconds)
            print(
                f"checkpoint {step}: {num_bytes / 2**20:,.1f} MiB, published after "
                f"{seconds:.2f} s, training stood still for {stood_still:.2f} s",
                flush=True,
            )

        try:
            self._agree(lambda: self._only_rank_0(lambda: start_folder(temporary)))
            entries = self._agree(write_slices)
            self._agree(lambda: self._only_rank_0(seal))
        except UserError:
            if self._rank == 0:
                with contextlib.suppress(OSError):
                    disk.remove_tree(temporary)
            raise
        if self._rank == 0:
            self._retire(step)

    def _only_rank_0(self, action: Callable[[], None]) -> None:
        if self._rank == 0:
            action()

    def _agree(self, action: Callable[[], _Result]) -> list[_Result]:
        """Do it on every rank; all learn all results, or all raise what went wrong on any."""
        self._progress("save")
        try:
            outcome: dict[str, Any] = {"result": action()}
        except OSError as error:
            outcome = {"error": f"rank {self._rank}: {describe_os_error(error, self._run_dir)}"}
        except Exception as error:  # the others must learn of it, or they wait for ever
            traceback.print_exc()
            outcome = {"error": f"rank {self._rank}: {type(error).__name__}: {error}"}
        self._progress("agree")
        outcomes: list[dict[str, Any]] = gather_json(outcome, self._group)
        errors = [o["error"] for o in outcomes if "error" in o]
        if errors:
            raise UserError(*errors)
        return [o["result"] for o in outcomes]

    def _retire(self, step: int) -> None:
        """Remove older checkpoints, except the newest `keep_last`, each `keep_every` steps and 0.

        Those between the one that the run goes on from and its own were passed over when it began,
        and do not count as kept; nor do newer ones.
        """
        if self._first_saved is None:
            self._first_saved = step
        every = self._config.keep_every
        older = [s for s in list_steps(self._run_dir) if s < step]
        begin = step if self._resumed_at is None else self._resumed_at
        good = [s for s in older if s <= begin or s >= self._first_saved]
        oldest = min([step, *good[: self._config.keep_last - 1]])
        try:
            for old in older:
                # Imported weights, step 0, stay: nothing else in the run can make them again.
                if 0 < old < oldest and not (every and old % every == 0):
                    remove(step_folder(self._run_dir, old))
        except OSError as error:
            print(
                f"warning: old checkpoint kept: {describe_os_error(error, self._run_dir)}",
                flush=True,
            )


# -------------------------------------------------------------------------------------------- read


def newest_checkpoint(
    run_dir: Path,
    rank: int = 0,
    world_size: int = 1,
    *,
    before: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Checkpoint | None:
    """The newest checkpoint (older than step `before`) that verifies; None in a run without any.

    Collective where `world_size` > 1: rank 0 lists the folder and decides what is there, every rank
    checks its share of the files, and all agree.

    Raises:
        UserError: there are, or were, checkpoints and none is good: a run never starts over by
            itself, from imported weights either, nor is a run that began with imported weights
            replayed from others.
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
            print(f"checkpoint passed over: {reasons[-1]}", flush=True)
    if reasons:
        raise UserError(
            f"{run_dir}: no checkpoint is whole ({'; '.join(reasons[:3])}) "
            "(restore one, or choose a new run.dir)"
        )
    if had_some:
        raise UserError(
            f"{run_dir}: its checkpoints are gone, {LEDGER} lists them "
            "(restore one, or choose a new run.dir)"
            if before is None
            else f"--replay: no checkpoint before step {before} is left, and the run began with "
            "imported weights (import them again, into another run.dir, and train)"
        )
    return None


def select_checkpoint(
    run_dir: Path, step: int | None, rank: int = 0, world_size: int = 1
) -> Checkpoint:
    """The verified checkpoint of `step`, or the newest one.

    Collective where `world_size` > 1: every rank checks its share of the files.

    Raises:
        UserError: there is none, or it is damaged.
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
    """The checkpoint in `folder`: rank 0 opens it first, then every rank checks its share.

    Raises:
        UserError: on all ranks, with all that is wrong for any of them.
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
    """The checkpoint, or what is wrong with it. Ranks above 0 know that it is there, and wait."""
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


def load(checkpoint: Checkpoint, slices: Iterable[ParameterSlice]) -> None:
    """Fill this rank's slices from a checkpoint; `Engine.refresh_weights` must follow.

    Raises:
        UserError: names or shapes are not those of this model.
    """
    shapes = checkpoint.shapes
    keys = STATE if checkpoint.has_adam_state() else ("master",)
    for piece in slices:
        found = shapes.get(piece.name)
        if found != tuple(piece.shape):
            raise UserError(
                f"{checkpoint.folder}: {piece.name} is {found or 'absent'}, "
                f"the model has {tuple(piece.shape)}"
            )
        for key in keys:
            piece.state[key].copy_(checkpoint.read(piece.name, key, piece.start, piece.stop))


def check_names(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Every parameter of a checkpoint is one of the model's, `names`.

    Raises:
        UserError: naming one that is not.
    """
    strange = sorted(checkpoint.shapes.keys() - set(names))
    if strange:
        raise UserError(f"{checkpoint.folder}: holds {strange[0]}, which the model has not")


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copy the fp32 weights of a checkpoint into a plain model (no engine, one process).

    Raises:
        UserError: names or shapes are not those of this model.
    """
    check_names(checkpoint, (name for name, _ in model.named_parameters()))
    shapes = checkpoint.shapes
    for name, parameter in model.named_parameters():
        if shapes.get(name) != tuple(parameter.shape):
            raise UserError(f"{checkpoint.folder}: {name} is {shapes.get(name) or 'absent'}")
        with torch.no_grad():
            parameter.copy_(checkpoint.read_parameter(name))


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """`value` of every rank, in order, on every rank; as JSON bytes, since pickles execute."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor([content.numel()], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    longest = int(max(sizes))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: content.numel()] = content.to(device)
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [
        json.loads(part[: int(n)].cpu().numpy().tobytes())
        for part, n in zip(parts, sizes, strict=True)
    ]
