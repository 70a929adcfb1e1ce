"""Peak memory and time of importing and exporting a model, on random weights of its shape."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tensorlm.config import Config
from tensorlm.hf.export_folder import hf_config, hf_name, write_json
from tensorlm.model import Llama
from tensorlm.runtime.errors import UserError

_FILE_BYTES = 10**9
_LAUNCHER = Path(__file__).parents[2] / "launcher/convert.py"


class Conversion(NamedTuple):
    """The cost of one run of `launcher/convert.py`."""

    name: str
    seconds: float
    peak_gib: float  # peak resident memory of the process, mapped files included
    disk_gib: float  # written to disk


def measure(config_file: Path, config: Config, folder: Path) -> list[Conversion]:
    """Import random bf16 weights into a checkpoint and export them again, with the same bytes.

    Args:
        config_file: TOML file of the run, for the launcher.
        config: its content, for the shape.
        folder: new folder for up to 6 bytes per parameter; removed at the end.

    Raises:
        UserError: the folder exists, a conversion failed, or bytes differ.
    """
    if folder.exists():
        raise UserError(f"--folder: must be a new folder, got {folder}, which exists")
    try:
        folder.mkdir(parents=True)
        source, run_dir, output = folder / "llama", folder / "run", folder / "hf"
        wanted = write_random_llama(config, source)
        common = ["--config", str(config_file), f"run.dir={run_dir}"]
        imported = _convert("import", run_dir, [*common, "--hf", str(source)])
        shutil.rmtree(source)
        exported = _convert("export", output, [*common, "--output", str(output)])
        found = weight_sha256s(output)
        different = [name for name, sha256 in wanted.items() if found.get(name) != sha256]
        if different:
            raise UserError(
                f"{output}: exported weights must equal the imported ones, but {len(different)} "
                f"differ, first {different[0]}"
            )
        return [imported, exported]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_random_llama(config: Config, folder: Path) -> dict[str, str]:
    """Write a Llama folder with bf16 weights, in files of about 1 GB; returns all sha256s."""
    folder.mkdir()
    with torch.device("meta"):
        parameters = dict(Llama(config.model).named_parameters())
    shapes = {hf_name(n): p.shape for n, p in parameters.items() if not n.endswith("hop_bias")}
    model = config.model.model_copy(update={"fold": ()})
    write_json(folder / "config.json", hf_config(model, config.data.seq_len, "bf16"))
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    weight_map: dict[str, str] = {}
    sha256s: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    for index, (name, shape) in enumerate(shapes.items()):
        repeats = -(-shape.numel() // block.numel())
        values = (block * (1 + index / 64)).to(torch.bfloat16).repeat(repeats)
        held[name] = values[: shape.numel()].view(shape).clone()
        sha256s[name] = _sha256(held[name])
        if sum(t.nbytes for t in held.values()) >= _FILE_BYTES or index == len(shapes) - 1:
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(held, folder / file)
            weight_map |= dict.fromkeys(held, file)
            held = {}
    index_path = folder / "model.safetensors.index.json"
    write_json(index_path, {"metadata": {}, "weight_map": weight_map})
    return sha256s


def weight_sha256s(folder: Path) -> dict[str, str]:
    """sha256 of every weight in a folder's safetensors files."""
    sha256s = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                sha256s[name] = _sha256(file.get_tensor(name))
    return sha256s


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().data).hexdigest()


def _convert(command: str, written: Path, arguments: list[str]) -> Conversion:
    """Run the launcher in a process, and measure its time and memory."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(_LAUNCHER), command, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"convert {command}: failed with exit code {process.returncode}")
    num_bytes = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    seconds = time.perf_counter() - started
    return Conversion(command, seconds, usage.ru_maxrss / 2**20, num_bytes / 2**30)


def format_table(rows: list[Conversion]) -> str:
    """The measurements as a table."""
    head = f"{'':8} {'peak memory':>12} {'written':>12} {'time':>9}"
    lines = [
        f"{row.name:8} {row.peak_gib:8.2f} GiB {row.disk_gib:8.2f} GiB {row.seconds:7.0f} s"
        for row in rows
    ]
    return "\n".join([head, *lines])
