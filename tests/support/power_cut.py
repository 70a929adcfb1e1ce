"""What a power cut may leave of what was written: a recorder of the disk, and states from it.

A synced file is whole, any other may be whole, absent, empty, half there or zeros; the names in a
folder are those of its last sync, and any first part of what was done to them since.
"""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from tensorlm.runtime import disk

Notes = list[tuple]  # (operation, argument, ...), in order


def _path(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))


class Recorder(disk.Disk):
    """Does what it is told, and notes it."""

    def __init__(self) -> None:
        self.notes: Notes = []

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self.notes.append(("make_folder", path))

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self.notes.append(("create", path))
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        self.notes.append(("write", _path(descriptor), bytes(data)))
        return super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        self.notes.append(("sync", _path(descriptor)))

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self.notes.append(("sync_folder", path))

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self.notes.append(("rename", old, new))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.notes.append(("unlink", path))

    def remove_folder(self, path: Path) -> None:
        super().remove_folder(path)
        self.notes.append(("unlink", path))


@dataclass
class File:
    data: bytes = b""
    synced: bytes | None = None


@dataclass
class Folder:
    """`names` as they are now; `synced` are those on the disk, `since` what was done after."""

    names: dict[str, "File | Folder"] = field(default_factory=dict)
    synced: dict[str, "File | Folder"] = field(default_factory=dict)
    since: list[tuple[str, "File | Folder | None", str | None]] = field(default_factory=list)

    def set(self, name: str, node: "File | Folder | None", gone: str | None = None) -> None:
        """`name` stands for `node` from now on (None: for nothing), and `gone` for nothing."""
        apply(self.names, name, node, gone)
        self.since.append((name, node, gone))


def apply(names: dict, name: str, node: "File | Folder | None", gone: str | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node
    names.pop(gone, None)


def rebuild(notes: Notes, root: Path) -> Folder:
    """The file system after `notes`, with what of it is durable."""
    top = Folder()

    def folder(path: Path) -> Folder:
        node = top
        for part in path.relative_to(root).parts:
            child = node.names[part]
            assert isinstance(child, Folder)
            node = child
        return node

    def file(path: Path) -> File:
        node = folder(path.parent).names[path.name]
        assert isinstance(node, File)
        return node

    for operation, path, *arguments in notes:
        if operation == "make_folder":
            folder(path.parent).set(path.name, Folder())
        elif operation == "create":
            folder(path.parent).set(path.name, File())
        elif operation == "write":
            file(path).data += arguments[0]
        elif operation == "sync":
            file(path).synced = file(path).data
        elif operation == "sync_folder":
            node = folder(path)
            node.synced, node.since = dict(node.names), []
        elif operation == "rename":
            parent = folder(path.parent)
            parent.set(arguments[0].name, parent.names[path.name], gone=path.name)
        elif operation == "unlink":
            folder(path.parent).set(path.name, None)
    return top


def write_out(folder: Folder, path: Path, rng: random.Random, mode: str) -> None:
    """One state in which `folder` may be found after the power went out.

    `mode`: what was not synced is "lost", all there ("kept"), names without data ("empty", "zeros")
    or a "mixed" lot.
    """
    path.mkdir()
    if mode == "mixed":
        num_kept = rng.randint(0, len(folder.since))
    else:
        num_kept = 0 if mode == "lost" else len(folder.since)
    names = dict(folder.synced)
    for name, node, gone in folder.since[:num_kept]:
        apply(names, name, node, gone)
    for name, node in names.items():
        if isinstance(node, Folder):
            write_out(node, path / name, rng, mode)
            continue
        data = node.data
        if node.synced is None:
            fate = rng.choice(["kept", "empty", "zeros", "half"]) if mode == "mixed" else mode
            zeros, half = bytes(len(data)), data[: len(data) // 2]
            data = {"lost": b"", "empty": b"", "zeros": zeros, "half": half}.get(fate, data)
        (path / name).write_bytes(data)
