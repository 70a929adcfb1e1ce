"""Checkpoints: each rank writes its slices, a manifest seals them, a rename publishes.

A checkpoint is published when all ranks agree that all they wrote is on the disk. There is no
pointer to the newest one: it is the highest step that verifies. `manifest.py` has the format and
how it is read, `publish.py` the order of writing.
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

from .manifest import list_steps, step_folder
from .publish import (
    describe_os_error,
    note,
    publish,
    remove,
    start_folder,
    write_manifest,
    write_tensors,
)
from .slices import ParameterSlice

_Result = TypeVar("_Result")

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
            size, sha256 = write_tensors(path, tensors, lambda _: self._progress("save"))
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


def check_disk_space(run_dir: Path, num_bytes: int, num_kept: int) -> None:
    """A checkpoint of `num_bytes` fits; a warning where not all that will be kept do.

    Raises:
        UserError: it does not fit.
    """
    free = shutil.disk_usage(run_dir).free
    if free < num_bytes:
        raise UserError(
            f"run.dir: {free / 2**30:.2f} GiB are free, one checkpoint takes "
            f"{num_bytes / 2**30:.2f} GiB (free some, or choose another run.dir)"
        )
    if free < num_bytes * (num_kept + 1):
        print(
            f"warning: {run_dir}: {free / 2**30:.2f} GiB are free, {num_kept} checkpoints and one "
            f"in the making take {num_bytes * (num_kept + 1) / 2**30:.2f} GiB",
            flush=True,
        )
