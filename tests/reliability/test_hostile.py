"""Checkpoints made to do harm: nothing runs, nothing outside is opened, one line says why."""

import ast
import hashlib
import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorlm.checkpoint import load_slices, manifest_text, newest_checkpoint
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.launch_env import free_port
from tests.reliability.conftest import TinyRuns
from tests.reliability.harness import Job
from tests.reliability.saves import LAST_STEP, save_all, slices
from tests.support.distributed import run_distributed
from tests.support.launching import ROOT

STEP = f"step-{LAST_STEP:08d}"
FILE = "rank-00000.safetensors"


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a manifest and seals it again, as its author could have."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    path.write_text(manifest_text(manifest))


def replace(folder: Path, content: bytes) -> None:
    """Gives a file other content, and the manifest its size and sha256."""
    (folder / FILE).write_bytes(content)

    def change(manifest: dict[str, Any]) -> None:
        entry = manifest["files"][0]
        entry["bytes"], entry["sha256"] = len(content), hashlib.sha256(content).hexdigest()

    rewrite(folder, change)


def with_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the safetensors header of a file."""
    content = (folder / FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    replace(folder, len(text).to_bytes(8, "little") + text + content[8 + size :])


def first_tensor(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: with_header(folder, lambda h: h["embedding/master"].update({key: value}))


def entry(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda m: m["files"][0].update({key: value}))


def move_out(folder: Path, name: str) -> None:
    """A link instead of a file, to the same file outside."""
    outside = folder.parents[1] / "outside"
    (folder / name).replace(outside / name)
    (folder / name).symlink_to(outside / name)


def move_folder_out(folder: Path) -> None:
    outside = folder.parents[1] / "outside" / folder.name
    folder.rename(outside)
    folder.symlink_to(outside)


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def torch_file(folder: Path) -> None:
    torch.save({"embedding": Payload(folder.parents[1] / "executed")}, folder / FILE)
    replace(folder, (folder / FILE).read_bytes())


def pickled(folder: Path) -> bytes:
    return pickle.dumps(Payload(folder.parents[1] / "executed")) * 100


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "pickle": lambda f: replace(f, pickled(f)),
    "pickle after a header": lambda f: replace(f, (8).to_bytes(8, "little") + pickled(f)),
    "pickle as manifest": lambda f: (f / "manifest.json").write_bytes(pickled(f)),
    "torch.save": torch_file,
    "header of 2^63 bytes": lambda f: replace(f, b"\xff" * 7 + b"\x7f" + bytes(2000)),
    "header of 100 GB": lambda f: replace(f, (10**11).to_bytes(8, "little") + bytes(2000)),
    "header of nothing": lambda f: replace(f, bytes(2000)),
    "tensors overlap": first_tensor("data_offsets", [0, 1 << 40]),
    "tensor elsewhere": first_tensor("data_offsets", [-8, 32]),
    "tensor of 2^60": first_tensor("shape", [1 << 60]),
    "tensor without shape": first_tensor("shape", []),
    "tensor of bytes": first_tensor("dtype", "U8"),
    "tensor of nonsense": first_tensor("dtype", "PICKLE"),
    "tensor missing": lambda f: with_header(f, lambda h: h.pop("embedding/master")),
    "name above": entry("name", "../../outside/secret"),
    "name absolute": entry("name", "/etc/passwd"),
    "name nested": entry("name", "x/rank-00000.safetensors"),
    "name with newline": entry("name", "rank-00000.safetensors\n"),
    "name with nul": entry("name", "rank-00000.safetensors\0"),
    "size negative": entry("bytes", -1),
    "size a float": entry("bytes", 1e308),
    "shape of 2^62": entry("shapes", {"embedding": [1 << 62], "norm": [5]}),
    "shape negative": entry("shapes", {"embedding": [-7, -3], "norm": [5]}),
    "slices too long": entry("slices", {"embedding": [0, 21], "norm": [0, 6]}),
    "slices leave a gap": entry("slices", {"embedding": [0, 1], "norm": [0, 2]}),
    "slices backwards": entry("slices", {"embedding": [10, 0], "norm": [0, 2]}),
    "slices far away": entry("slices", {"embedding": [0, 1 << 62], "norm": [0, 2]}),
    "no files": lambda f: rewrite(f, lambda m: m.update(files=[])),
    "file twice": lambda f: rewrite(f, lambda m: m["files"].append(m["files"][0])),
    "other format": lambda f: rewrite(f, lambda m: m.update(format="x" * 10**6)),
    "other version": lambda f: rewrite(f, lambda m: m.update(version=2)),
    "step of another type": lambda f: rewrite(f, lambda m: m.update(step=str(LAST_STEP))),
    "step above": lambda f: rewrite(f, lambda m: m.update(step=10**30)),
    "nested JSON": lambda f: (f / "manifest.json").write_text("[" * 10**6 + "]" * 10**6),
    "JSON bomb": lambda f: os.truncate(f / "manifest.json", 1 << 32),
    "number of a million digits": lambda f: (f / "manifest.json").write_text("9" * 10**6),
    "not ASCII": lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "linked file": lambda f: move_out(f, FILE),
    "linked manifest": lambda f: move_out(f, "manifest.json"),
    "linked folder": move_folder_out,
    "pipe as file": lambda f: pipe(f, FILE),
    "pipe as manifest": lambda f: pipe(f, "manifest.json"),
    "folder as file": lambda f: folder_instead(f / FILE),
    "folder as manifest": lambda f: folder_instead(f / "manifest.json"),
    "link beside": lambda f: (f / "more").symlink_to("/etc/passwd"),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one good checkpoint of one process."""
    folder = tmp_path_factory.mktemp("hostile")
    run_distributed(lambda: _save(folder), 1)
    return folder / "run"


def _save(folder: Path) -> None:
    from tensorlm.checkpoint import Saver
    from tensorlm.config import CheckpointConfig

    Saver(folder / "run", CheckpointConfig()).save(LAST_STEP, slices(LAST_STEP, 0, 1), {})


def load_watched(run: Path) -> tuple[str, list[str]]:
    """What loading the newest checkpoint says, and what it did that it has no business to."""
    root, events = str(run), []
    opening_ours = (str(Path(sys.prefix)), str(ROOT), "/usr/", "/proc/", "/sys/")

    def watch(event: str, args: tuple) -> None:
        if event in ("pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "compile"):
            events.append(f"{event} {args[:1]}")
        elif event == "open" and isinstance(args[0], (str, bytes, Path)):
            path = os.fsdecode(args[0])
            if args[2] & os.O_NOFOLLOW and path.startswith(root + "/"):
                return  # which opens no link
            is_inside = path.startswith(root + "/") and os.path.realpath(path).startswith(root)
            if not is_inside and not path.startswith(opening_ours):
                events.append(f"open {path}")

    sys.addaudithook(watch)
    try:
        found = newest_checkpoint(run)
        assert found is not None
        load_slices(found, slices(LAST_STEP, 0, 1))
    except UserError as error:
        said = str(error)
    else:
        said = "loaded"
    return said, list(events)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_checkpoint_does_nothing_but_fail(tmp_path: Path, saved: Path, kind: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    shutil.copytree(saved, tmp_path / "run")
    HOSTILE[kind](tmp_path / "run" / STEP)
    ((said, events),) = run_distributed(lambda: load_watched(tmp_path / "run"), 1)
    assert events == []
    assert not (tmp_path / "executed").exists()
    assert said != "loaded"
    assert "\n" not in said
    assert len(said.replace(str(tmp_path), "")) < 300


def test_good_checkpoint_loads_where_hostile_ones_do_not(tmp_path: Path, saved: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    ((said, events),) = run_distributed(lambda: load_watched(tmp_path / "run"), 1)
    assert (said, events) == ("loaded", [])


def test_leftovers_that_are_links_are_removed_not_followed(tiny: TinyRuns) -> None:
    config = tiny("run")
    run, outside = Path(config.run.dir), tiny.folder / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    leftover = run / ".tmp-step-00000001"
    leftover.mkdir(parents=True)
    (leftover / "link").symlink_to(outside)
    (leftover / "rank-00000.safetensors").symlink_to(outside / "precious")
    job = Job(config, 1, run=save_all)
    assert job.wait() == [0], job.output()
    assert not leftover.exists()
    assert (outside / "precious").read_text() == "precious"


FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "pickle.load",
    "pickle.loads", "pickle.Unpickler", "yaml.load", "dill.load",
}  # fmt: skip
FORBIDDEN_OPTIONS = {"shell", "allow_pickle", "trust_remote_code"}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}


def forbidden(node: ast.AST) -> list[str]:
    """What a piece of code does that may run what it reads."""
    match node:
        case ast.Call() if ast.unparse(node.func) in FORBIDDEN_CALLS:
            return [ast.unparse(node.func)]
        case ast.keyword(arg=str(name)) if name in FORBIDDEN_OPTIONS:
            return [] if ast.unparse(node.value) == "False" else [f"{name}="]
        case ast.Dict():  # options to be passed on
            return [
                k.value
                for k in node.keys
                if isinstance(k, ast.Constant) and k.value in FORBIDDEN_OPTIONS
            ]
        case ast.Import() | ast.ImportFrom():
            names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
            return sorted(names & FORBIDDEN_MODULES)
    return []


def test_our_code_has_no_call_that_runs_what_it_reads() -> None:
    found = []
    for folder in ("tensorlm", "kernels", "parallel", "launcher"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                found += [f"{path.relative_to(ROOT)}: {what}" for what in forbidden(node)]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)", "import pickle", "from pickle import loads", "__import__('pickle')",
        "run(command, shell=True)", "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)", "{'trust_remote_code': True}",
        "load(path, trust_remote_code=chosen)",
    ],
)  # fmt: skip
def test_call_that_runs_what_it_reads_is_found(code: str) -> None:
    assert any(forbidden(node) for node in ast.walk(ast.parse(code)))


def test_secrets_of_the_environment_are_written_nowhere(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = f"canary-{random.Random(0).randbytes(8).hex()}"
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "PASSWORD"):
        monkeypatch.setenv(name, canary)
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{canary}@proxy.invalid:1")
    config = tiny("run")
    output = tiny.finish(config, 2).output()
    files = [path for path in Path(config.run.dir).rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if canary.encode() in path.read_bytes()] == []
    assert canary not in output


def listening_sockets(pid: int) -> dict[int, str]:
    """Port and local address (hexadecimal) of each TCP socket that a process listens on."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found[int(port, 16)] = address
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("world", [1, 2])
def test_only_the_rendezvous_listens_beyond_this_machine(tiny: TinyRuns, world: int) -> None:
    config = tiny("run", "train.steps=100000", "checkpoint.every=100000")
    port = free_port()
    job = Job(config, world, port=port)
    job.wait_for(Path(config.run.dir) / "metrics.jsonl")
    sockets = [listening_sockets(pid) for pid in job.pids]
    job.end()
    assert all(sockets)  # gloo's, between the ranks
    outside = [{p for p, address in s.items() if address not in LOOPBACK} for s in sockets]
    assert outside == ([{port}, set()] if world > 1 else [set()])
