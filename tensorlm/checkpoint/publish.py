"""Writing a checkpoint: files, the manifest that seals them, and the rename that publishes them.

Files are written to `RUN/.tmp-step-XXXXXXXX` and synced to the disk (fsync) before the folder is
renamed. A folder is renamed before it is removed. So a folder `step-*` is always complete.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorlm.runtime import disk
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.strict_json import json_text

from .manifest import MANIFEST, list_steps, manifest_text, step_folder
from .safetensors_file import write_safetensors

LEDGER = "checkpoints.jsonl"
_WEIGHT_FILE_BYTES = 1 << 30  # of imported weights: only one file at a time is in memory


def write_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> tuple[int, str]:
    """Write tensors as float32, one at a time; returns the file's size and sha256."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    pieces = (tensor.detach().float().cpu().contiguous() for tensor in tensors.values())
    return write_safetensors(path, shapes, torch.float32, pieces, progress)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    disk.write_file(folder / MANIFEST, [manifest_text(content).encode()])


def publish(temporary: Path, target: Path) -> None:
    """Commit a complete folder: give it its final name in one atomic, durable step."""
    disk.sync_folder(temporary)
    doomed = _doomed(target)
    if target.exists():  # a damaged one of the same step, skipped when the run resumed
        disk.rename(target, doomed)
    disk.rename(temporary, target)
    if doomed.exists():
        disk.remove_tree(doomed)


def note(run_dir: Path, step: int, num_bytes: int, stall: float, seconds: float) -> None:
    """Append a line to the run's ledger, which lists all checkpoints ever published."""
    record = {
        "step": step,
        "bytes": num_bytes,
        "stall_seconds": round(stall, 4),
        "seconds": round(seconds, 4),
    }
    with open(run_dir / LEDGER, "a") as file:
        file.write(json_text(record) + "\n")


def was_imported(run_dir: Path) -> bool:
    """Whether the run began with imported weights, even if they have been removed since."""
    ledger = run_dir / LEDGER
    return ledger.exists() and ledger.read_text().startswith('{"step": 0,')


def has_trained(run_dir: Path) -> bool:
    """Whether a checkpoint after step 0 was ever published, even if it has been removed since."""
    ledger = run_dir / LEDGER
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return any(re.match(r'\{"step": [1-9]', line) for line in lines)


def remove(folder: Path) -> None:
    """Remove a checkpoint; rename it first, so that a partial one never looks like a checkpoint."""
    disk.rename(folder, _doomed(folder))
    disk.remove_tree(_doomed(folder))


def _doomed(folder: Path) -> Path:
    return folder.with_name(f".del-{folder.name}")


def sweep(run_dir: Path) -> None:
    """Remove leftovers of interrupted saves and removals (on one rank, before any save)."""
    for path in [*run_dir.glob(".tmp-step-*"), *run_dir.glob(".del-step-*")]:
        try:
            disk.remove_tree(path)
        except OSError as error:
            raise UserError(
                f"{describe_os_error(error, run_dir)} (left by an interrupted save)"
            ) from None


def describe_os_error(error: OSError, default: Path) -> str:
    return f"{error.filename or default}: {error.strerror}"


def write_weights(
    run_dir: Path,
    parameters: Iterable[tuple[str, Tensor]],
    info: dict[str, Any],
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> Path:
    """Publish parameters without Adam state as the checkpoint of step 0, in one process.

    `progress` is called with the number of bytes just written.

    Raises:
        UserError: the run already has checkpoints, or writing fails.
    """
    if list_steps(run_dir):
        raise UserError(f"{run_dir}: already has checkpoints (choose a new run.dir)")
    target = step_folder(run_dir, 0)
    entries: list[dict[str, Any]] = []
    started = time.perf_counter()
    try:
        with disk.atomic_folder(target) as folder:
            for index, group in enumerate(_groups(parameters, _WEIGHT_FILE_BYTES)):
                path = folder / f"rank-{index:05d}.safetensors"
                tensors = {f"{name}/master": tensor.flatten() for name, tensor in group}
                num_bytes, sha256 = write_tensors(path, tensors, progress)
                entries.append(
                    {
                        "name": path.name,
                        "bytes": num_bytes,
                        "sha256": sha256,
                        "slices": {name: [0, tensor.numel()] for name, tensor in group},
                        "shapes": {name: list(tensor.shape) for name, tensor in group},
                    }
                )
            write_manifest(folder, {"step": 0, **info, "files": entries})
        seconds = time.perf_counter() - started
        note(run_dir, 0, sum(e["bytes"] for e in entries), seconds, seconds)
    except OSError as error:
        raise UserError(describe_os_error(error, run_dir)) from None
    return target


def _groups(
    parameters: Iterable[tuple[str, Tensor]], num_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Group consecutive parameters into groups of about `num_bytes`."""
    group: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in parameters:
        group.append((name, tensor))
        size += tensor.numel() * 4
        if size >= num_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group
