"""Checkpoints: each rank writes its slices, a manifest seals them, a rename publishes.

    RUN/step-00001200/
        rank-00000.safetensors ...   flat fp32 slices, `NAME/master`, `/exp_avg`, `/exp_avg_sq`
        manifest.json                who holds what; size and sha256 of each file and of itself

There is no pointer to the newest checkpoint: it is the highest step that verifies. Any number of
ranks reads what any number wrote, since slices are addressed by parameter name and range.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from .engine import STATE, ParameterSlice
from .errors import UserError

FORMAT = "tensorlm-checkpoint"
VERSION = 1
_WEIGHT_FILE_BYTES = 1 << 30  # of imported weights, so that one file at a time is in memory
_STEP_NAME = re.compile(r"step-(\d{8})")
_RANK_NAME = re.compile(r"rank-\d{5}\.safetensors")


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint of `step`."""
    return run_dir / f"step-{step:08d}"


def list_steps(run_dir: Path) -> list[int]:
    """Steps that have a published checkpoint folder, newest first (not verified)."""
    matches = (_STEP_NAME.fullmatch(path.name) for path in run_dir.glob("step-*"))
    return sorted((int(m[1]) for m in matches if m), reverse=True)


# ------------------------------------------------------------------------------------------- write


def save(
    run_dir: Path, step: int, slices: Iterable[ParameterSlice], info: dict[str, Any], keep_last: int
) -> Path:
    """Write and publish the checkpoint of `step`, then remove all but the newest `keep_last`.

    Collective: every rank calls it with its own slices. Nobody leaves before it is published.

    Args:
        run_dir: folder of the run.
        step: optimizer steps done.
        slices: this rank's slices; those that it does not own are passed over.
        info: plain values for the manifest (tokens, config, data fingerprint).
        keep_last: checkpoints to keep.

    Raises:
        UserError: a rank could not write; older checkpoints are untouched.
    """
    temporary = run_dir / f".tmp-step-{step:08d}"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    name = f"rank-{dist.get_rank():05d}.safetensors"
    try:
        entry = _write_slices(temporary / name, [s for s in slices if s.is_owned])
    except OSError as error:
        entry = {"error": f"{temporary / name}: {error.strerror}"}
    entries = _gather_json({"name": name, **entry})
    errors = [e["error"] for e in entries if "error" in e]
    if errors:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(*errors)
    target = step_folder(run_dir, step)
    if dist.get_rank() == 0:
        _write_manifest(temporary, {"step": step, **info, "files": entries})
        _publish(temporary, target)
        for old in list_steps(run_dir)[keep_last:]:
            _remove(step_folder(run_dir, old))
    dist.barrier()
    return target


def write_weights(
    run_dir: Path, parameters: Iterable[tuple[str, Tensor]], info: dict[str, Any]
) -> Path:
    """Publish whole parameters without Adam state as the checkpoint of step 0 (one process).

    Raises:
        UserError: the run has checkpoints already, or the disk refused.
    """
    if list_steps(run_dir):
        raise UserError(f"{run_dir}: has checkpoints already (choose a new run.dir)")
    temporary = run_dir / ".tmp-step-00000000"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    entries = []
    for index, group in enumerate(_groups(parameters, _WEIGHT_FILE_BYTES)):
        path = temporary / f"rank-{index:05d}.safetensors"
        tensors = {f"{name}/master": tensor.flatten() for name, tensor in group}
        num_bytes, sha256 = write_safetensors(path, tensors)
        entries.append(
            {
                "name": path.name,
                "bytes": num_bytes,
                "sha256": sha256,
                "slices": {name: [0, tensor.numel()] for name, tensor in group},
                "shapes": {name: list(tensor.shape) for name, tensor in group},
            }
        )
    _write_manifest(temporary, {"step": 0, **info, "files": entries})
    target = step_folder(run_dir, 0)
    _publish(temporary, target)
    return target


def _groups(
    parameters: Iterable[tuple[str, Tensor]], num_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive parameters of together about `num_bytes`."""
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


def _write_slices(path: Path, slices: list[ParameterSlice]) -> dict[str, Any]:
    tensors = {f"{s.name}/{key}": value for s in slices for key, value in s.state.items()}
    num_bytes, sha256 = write_safetensors(path, tensors)
    ranges = {s.name: [s.start, s.stop] for s in slices}
    shapes = {s.name: list(s.shape) for s in slices}
    return {"bytes": num_bytes, "sha256": sha256, "slices": ranges, "shapes": shapes}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Write float32 tensors in safetensors format, one at a time; returns size and sha256.

    Unlike `safetensors.torch.save_file` it hashes while it writes, and never holds a second copy of
    all tensors.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * 4
        header[name] = {
            "dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for part in _safetensors_parts(text, tensors):
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _safetensors_parts(header: bytes, tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors.values():
        yield tensor.detach().float().cpu().contiguous().view(torch.uint8).numpy().data


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    manifest = {"format": FORMAT, "version": VERSION, **content}
    manifest["sha256"] = _manifest_sha256(manifest)
    with open(folder / "manifest.json", "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, target: Path) -> None:
    """The commit: a complete folder gets its final name in one step, and stays there."""
    _sync_folder(temporary)
    if target.exists():  # a damaged one of the same step, passed over when the run resumed
        _remove(target)
    temporary.rename(target)
    _sync_folder(target.parent)


def _remove(folder: Path) -> None:
    doomed = folder.with_name(f".del-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------------- read


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint whose manifest verified."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for entry in self.manifest["files"]:
            shapes.update({name: tuple(shape) for name, shape in entry["shapes"].items()})
        return shapes

    def bad_files(self, part: int = 0, num_parts: int = 1) -> list[str]:
        """Files (every `num_parts`-th, from `part`) whose size or sha256 is not the manifest's."""
        bad = []
        for entry in self.manifest["files"][part::num_parts]:
            path = self.folder / entry["name"]
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                bad.append(f"{entry['name']}: missing, or not {entry['bytes']} bytes")
                continue
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    bad.append(f"{entry['name']}: checksum differs")
        return bad

    def has_adam_state(self) -> bool:
        """False for imported weights, which start with fresh moments."""
        return bool(self.manifest.get("adam_state", True))

    def read(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of flattened parameter `name`, wherever ranks left them."""
        result = torch.empty(stop - start)
        missing = stop - start
        for entry in self.manifest["files"]:
            first, last = entry["slices"].get(name, (0, 0))
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                with safe_open(self.folder / entry["name"], "pt") as file:
                    part = file.get_slice(f"{name}/{key}")[begin - first : end - first]
                result[begin - start : end - start] = part
                missing -= end - begin
        if missing:
            raise UserError(f"{self.folder}: {missing} elements of {name}/{key} are missing")
        return result

    def read_parameter(self, name: str) -> Tensor:
        """A whole parameter in its shape, float32."""
        shape = torch.Size(self.shapes[name])
        return self.read(name, "master", 0, shape.numel()).view(shape)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify a manifest (not the files that it names).

    Raises:
        UserError: no manifest, a damaged one, or one of another format.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        seal = manifest.pop("sha256")
        names = [entry["name"] for entry in manifest["files"]]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a manifest") from None
    if seal != _manifest_sha256(manifest):
        raise UserError(f"{path}: checksum differs")
    if manifest["format"] != FORMAT or manifest["version"] != VERSION:
        raise UserError(f"{path}: format {manifest['format']} {manifest['version']} is not known")
    if f"step-{manifest['step']:08d}" != folder.name:
        raise UserError(f"{path}: of step {manifest['step']}, in folder {folder.name}")
    if not all(_RANK_NAME.fullmatch(name) for name in names):
        raise UserError(f"{path}: names a file outside its folder")
    return Checkpoint(folder, manifest)


def newest_checkpoint(run_dir: Path, rank: int = 0, world_size: int = 1) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None in a run without any.

    Collective where `world_size` > 1: every rank checks its share of the files and all agree.

    Raises:
        UserError: there are checkpoints and none is good (a run never starts over silently).
    """
    reasons = []
    for step in list_steps(run_dir):
        folder = step_folder(run_dir, step)
        try:
            checkpoint = open_checkpoint(folder)
            bad = checkpoint.bad_files(rank, world_size)
        except UserError as error:
            bad = list(error.problems)
        if world_size > 1:
            bad = [problem for part in _gather_json(bad) for problem in part]
        if not bad:
            return checkpoint
        reasons.append(f"{folder.name}: {bad[0]}")
        if rank == 0:
            print(f"checkpoint passed over: {reasons[-1]}", flush=True)
    if reasons:
        raise UserError(f"{run_dir}: no checkpoint is whole ({'; '.join(reasons)})")
    return None


def select_checkpoint(run_dir: Path, step: int | None) -> Checkpoint:
    """The verified checkpoint of `step`, or the newest one (one process).

    Raises:
        UserError: there is none, or it is damaged.
    """
    if step is None:
        newest = newest_checkpoint(run_dir)
        if newest is None:
            raise UserError(f"{run_dir}: no checkpoint (train first, or set run.dir)")
        return newest
    checkpoint = open_checkpoint(step_folder(run_dir, step))
    bad = checkpoint.bad_files()
    if bad:
        raise UserError(*(f"{checkpoint.folder}: {problem}" for problem in bad))
    return checkpoint


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


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copy the fp32 weights of a checkpoint into a plain model (no engine, one process).

    Raises:
        UserError: names or shapes are not those of this model.
    """
    shapes = checkpoint.shapes
    for name, parameter in model.named_parameters():
        if shapes.get(name) != tuple(parameter.shape):
            raise UserError(f"{checkpoint.folder}: {name} is {shapes.get(name) or 'absent'}")
        with torch.no_grad():
            parameter.copy_(checkpoint.read_parameter(name))


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _gather_json(value: Any) -> list[Any]:
    """`value` of every rank, in order, on every rank; as JSON bytes, since pickles execute."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor([content.numel()], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = int(max(sizes))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: content.numel()] = content.to(device)
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [
        json.loads(part[: int(n)].cpu().numpy().tobytes())
        for part, n in zip(parts, sizes, strict=True)
    ]
