"""Saving checkpoints: each rank writes its slices, a manifest seals them, a rename publishes them.

A checkpoint is published once all ranks have confirmed that their files are on the disk. There is
no pointer to the newest checkpoint: it is the highest step that verifies. `manifest.py` describes
the format, `publish.py` the order of writing.
"""

import contextlib
import shutil
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tensorlm.config import CheckpointConfig
from tensorlm.runtime import disk
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.ranks import EXCHANGE_LIMIT, gather_json

from . import publish
from .manifest import list_steps, step_folder
from .slices import ParameterSlice

_Result = TypeVar("_Result")

# ------------------------------------------------------------------------------------------- write


class Saver:
    """Publishes the checkpoints of one run (collective); at most one save is in progress.

    With `config.background`, `save` returns once it has copied the state, and a thread writes the
    copy while training continues.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        resumed_at: int | None = None,
        progress: Callable[[str], None] = lambda part: None,
    ) -> None:
        """Create the process group for saves; collective.

        Args:
            run_dir: folder of the run.
            config: settings of checkpoints.
            resumed_at: step from which the run continues; None: not known.
            progress: called with "save" as bytes are written, and with "agree" before waiting for
                other ranks.
        """
        self._run_dir = run_dir
        self._config = config
        self._resumed_at = resumed_at
        self._first_saved: int | None = None
        self._progress = progress
        # A separate CPU group, since a background save communicates while training does.
        self._group = dist.new_group(backend="gloo", timeout=EXCHANGE_LIMIT)
        self._rank = dist.get_rank()
        self._copies: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, slices: Iterable[ParameterSlice], info: dict[str, Any]) -> None:
        """Publish the checkpoint of `step` from this rank's slices, then remove old ones.

        Args:
            step: number of completed optimizer steps.
            slices: this rank's slices; those that it does not own are skipped.
            info: plain values for the manifest (state, config, data fingerprint).

        Raises:
            UserError: a rank could not write this checkpoint or the previous one; published
                checkpoints are untouched.
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
            except BaseException as error:  # `wait` raises it
                self._error = error

        self._thread = Thread(target=work, name=f"save-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until no save is in progress.

        Raises:
            UserError: on every rank, if the save failed on any rank. If the ranks could not
                communicate, that error is raised instead.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    @property
    def has_failed(self) -> bool:
        """Whether the current background save has failed; `wait` raises its error."""
        return self._error is not None

    def _copy(self, name: str, value: Tensor) -> Tensor:
        """Copy one tensor for the writing thread; all saves reuse the same memory."""
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
        temporary = disk.temporary_folder(target)
        name = f"rank-{self._rank:05d}.safetensors"

        def write_slices() -> dict[str, Any]:
            path = temporary / name
            size, sha256 = publish.write_tensors(path, tensors, lambda _: self._progress("save"))
            return {"name": name, "bytes": size, "sha256": sha256, **layout}

        def seal() -> None:
            publish.write_manifest(temporary, {"step": step, **info, "files": entries})
            publish.publish(temporary, target)
            seconds = time.perf_counter() - started
            num_bytes, blocked = sum(e["bytes"] for e in entries), stall or seconds
            publish.note(self._run_dir, step, num_bytes, blocked, seconds)
            print(
                f"checkpoint {step}: {num_bytes / 2**20:,.1f} MiB, published after "
                f"{seconds:.2f} s, training was blocked for {blocked:.2f} s",
                flush=True,
            )

        try:
            self._agree(lambda: self._only_rank_0(lambda: disk.start_folder(target)))
            entries = self._agree(write_slices)
            self._agree(lambda: self._only_rank_0(seal))
        except UserError:
            if self._rank == 0:
                with contextlib.suppress(OSError):
                    disk.remove_tree(temporary)
            raise
        if self._rank == 0:
            self._retire(step)

    def _only_rank_0(self, action: Callable[[], object]) -> None:
        if self._rank == 0:
            action()

    def _agree(self, action: Callable[[], _Result]) -> list[_Result]:
        """Run `action` on every rank; returns all results, or raises the errors of all ranks."""
        self._progress("save")
        try:
            outcome: dict[str, Any] = {"result": action()}
        except OSError as error:
            problem = publish.describe_os_error(error, self._run_dir)
            outcome = {"error": f"rank {self._rank}: {problem}"}
        except Exception as error:  # the other ranks must learn of it, or they would wait forever
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

        Checkpoints between the resumed step and the first saved one were skipped as damaged. They
        do not count toward `keep_last`, and neither do newer ones.
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
                # Keep imported weights (step 0): nothing else in the run can recreate them.
                if 0 < old < oldest and not (every and old % every == 0):
                    publish.remove(step_folder(self._run_dir, old))
        except OSError as error:
            print(
                "warning: an old checkpoint could not be removed: "
                f"{publish.describe_os_error(error, self._run_dir)}",
                flush=True,
            )


# -------------------------------------------------------------------------------------------- read


def check_disk_space(run_dir: Path, num_bytes: int, num_kept: int) -> None:
    """Check that a checkpoint of `num_bytes` fits; warn if `num_kept` plus one do not fit.

    Raises:
        UserError: it does not fit.
    """
    free = shutil.disk_usage(run_dir).free
    if free < num_bytes:
        raise UserError(
            f"run.dir: must have {num_bytes / 2**30:.2f} GiB free for one checkpoint, got "
            f"{free / 2**30:.2f} GiB (free some, or choose another run.dir)"
        )
    if free < num_bytes * (num_kept + 1):
        print(
            f"warning: {run_dir}: {free / 2**30:.2f} GiB free; checkpoint.keep_last = {num_kept} "
            f"and the one being written need {num_bytes * (num_kept + 1) / 2**30:.2f} GiB",
            flush=True,
        )
