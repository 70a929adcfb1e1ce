"""The format of checkpoints on disk, and reading them without trusting their content.

    RUN/step-00001200/
        rank-00000.safetensors ...   flat fp32 slices, `NAME/master`, `/exp_avg`, `/exp_avg_sq`
        manifest.json                slices in each file; size and sha256 of each file and of itself

Slices are addressed by parameter name and range, so any number of ranks can read a checkpoint.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tensorlm.config.settings_errors import problem_lines
from tensorlm.runtime import disk
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.progress import byte_bar

from .slices import STATE

FORMAT = "tensorlm-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 1 << 28
_STEP_NAME = re.compile(r"step-(\d{8,})")


class _File(BaseModel):
    """One entry of `files`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=r"^rank-\d{5}\.safetensors$")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    slices: dict[str, Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]]
    shapes: dict[str, list[NonNegativeInt]]


class _Manifest(BaseModel):
    """Fields of every manifest. The run adds its own, which this module does not check."""

    model_config = ConfigDict(extra="allow", strict=True)

    format: str
    version: int
    step: int = Field(ge=0)
    adam_state: bool = True
    files: list[_File] = Field(min_length=1)


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint of `step`."""
    return run_dir / f"step-{step:08d}"


def list_steps(run_dir: Path) -> list[int]:
    """Steps that have a published checkpoint folder, newest first (not verified)."""
    matches = (_STEP_NAME.fullmatch(path.name) for path in run_dir.glob("step-*"))
    return sorted((int(m[1]) for m in matches if m), reverse=True)


def manifest_text(content: dict[str, Any]) -> str:
    """The text of a manifest file, sealed by a sha256 of itself."""
    manifest = {"format": FORMAT, "version": VERSION, **content}
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": seal}, indent=1)


class Checkpoint(NamedTuple):
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

    def num_elements(self, name: str) -> int:
        """Number of elements of one parameter."""
        return torch.Size(self.shapes[name]).numel()

    def bad_files(
        self, part: int = 0, num_parts: int = 1, progress: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Problems of the files (every `num_parts`-th one, from `part` on): size, sha256, links.

        `progress` is called while files are read; part 0 shows a progress bar.
        """
        entries, bad = self.manifest["files"][part::num_parts], []
        total = sum(entry["bytes"] for entry in entries)
        title, is_shown = f"verify {self.folder.name}", part == 0
        with byte_bar(total, title, is_shown=is_shown, progress=progress) as moved:
            for entry in entries:
                try:
                    size, sha256 = disk.file_sha256(self.folder / entry["name"], moved)
                except OSError as error:
                    bad.append(f"{entry['name']}: {error.strerror}")
                    continue
                if size != entry["bytes"]:
                    bad.append(f"{entry['name']}: must have {entry['bytes']} bytes, got {size}")
                elif sha256 != entry["sha256"]:
                    bad.append(f"{entry['name']}: checksum differs")
        return bad

    def read(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """Read elements [start, stop) of flattened parameter `name` from all files that hold them.

        Raises:
            UserError: a file does not match the manifest.
        """
        result = torch.empty(stop - start)
        for entry in self.manifest["files"]:
            first, last = entry["slices"].get(name, (0, 0))
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                path = self.folder / entry["name"]
                try:
                    with safe_open(path, "pt") as file:
                        part = file.get_slice(f"{name}/{key}")[begin - first : end - first]
                    result[begin - start : end - start] = part
                except (SafetensorError, RuntimeError, OSError, ValueError, LookupError) as error:
                    problem = str(error).splitlines()[0][:120]
                    raise UserError(f"{path}: {name}/{key} cannot be read ({problem})") from None
        return result

    def read_parameter(self, name: str) -> Tensor:
        """Read a whole parameter in its shape, float32."""
        shape = torch.Size(self.shapes[name])
        return self.read(name, "master", 0, shape.numel()).view(shape)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify a manifest, and check that the folder holds exactly its files.

    `Checkpoint.bad_files` verifies the content of the files.

    Raises:
        UserError: the manifest is missing, damaged, of another format, or does not match the
            folder.
    """
    path = folder / MANIFEST
    manifest = _read_manifest(path)
    if folder.name != step_folder(folder.parent, manifest["step"]).name:
        raise UserError(
            f"{path}: step must be that of the folder {folder.name}, got {manifest['step']}"
        )
    _check_slices(path, manifest)
    names = {entry["name"] for entry in manifest["files"]} | {MANIFEST}
    found = {name for name in os.listdir(folder) if not name.startswith(".nfs")}
    if found != names:
        odd = sorted(found - names) or sorted(names - found)
        raise UserError(f"{folder}: {odd[0]} is {'unexpected' if found - names else 'missing'}")
    return Checkpoint(folder, manifest)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        if path.parent.is_symlink() or not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(f"{path}: must be a regular file, not a link")
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise UserError(
                f"{path}: must have at most {_MAX_MANIFEST_BYTES:,} bytes, got "
                f"{path.stat().st_size:,}"
            )
        text = path.read_bytes().decode("ascii")
        manifest: dict[str, Any] = json.loads(text)
        seal = manifest.pop("sha256")
        _Manifest.model_validate(manifest)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = "not a manifest"
        if isinstance(error, ValidationError):
            reason = problem_lines(error, reason)[0]
        raise UserError(f"{path}: {reason[:160]}") from None
    if manifest["format"] != FORMAT or manifest["version"] != VERSION:
        raise UserError(
            f"{path}: format must be {FORMAT} {VERSION}, got {manifest['format'][:40]} "
            f"{manifest['version']}"
        )
    # Require the written bytes, not merely JSON with the same meaning.
    if text != manifest_text(manifest) or not isinstance(seal, str):
        raise UserError(f"{path}: checksum differs")
    return manifest


def _check_slices(path: Path, manifest: dict[str, Any]) -> None:
    """Check that slices cover each parameter exactly once and fit into their files."""
    num_keys = len(STATE) if manifest.get("adam_state", True) else 1
    shapes: dict[str, list[int]] = {}
    ranges: dict[str, list[list[int]]] = {}
    for entry in manifest["files"]:
        size = sum(stop - start for start, stop in entry["slices"].values())
        if size * 4 * num_keys > entry["bytes"] or entry["slices"].keys() != entry["shapes"].keys():
            raise UserError(f"{path}: {entry['name']} does not match its slices")
        for name, span in entry["slices"].items():
            ranges.setdefault(name, []).append(span)
            if shapes.setdefault(name, entry["shapes"][name]) != entry["shapes"][name]:
                raise UserError(f"{path}: {name} has two shapes")
    for name, spans in ranges.items():
        at = 0
        for start, stop in sorted(span for span in spans if span[0] != span[1]):
            if start != at or stop < start:
                raise UserError(
                    f"{path}: slices of {name} must be contiguous, got {start} after {at}"
                )
            at = stop
        if at != torch.Size(shapes[name]).numel():
            raise UserError(
                f"{path}: slices of {name} must have {torch.Size(shapes[name]).numel()} elements, "
                f"got {at}"
            )
