"""Metrics of a run: the progress line, metrics.jsonl and TensorBoard, written by rank 0."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from tensorlm.config import SETTINGS, Config, config_toml
from tensorlm.runtime import disk
from tensorlm.runtime.progress import format_duration
from tensorlm.runtime.strict_json import json_text

# A page of charts in this order; TensorBoard sorts its other pages by tag. The tags here are
# regular expressions.
_LAYOUT = {
    "training": {
        "loss": ["Multiline", ["train/loss"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
        "learning rate": ["Multiline", ["train/lr"]],
    },
    "held-out text": {"perplexity by length": ["Multiline", ["eval/ppl/.*"]]},
    "speed": {
        "tokens per second": ["Multiline", ["perf/tokens_per_second"]],
        "share of the peak": ["Multiline", ["perf/mfu", "perf/hfu"]],
        "memory in GiB": ["Multiline", ["perf/memory_gib"]],
    },
}


class Metrics:
    """Writes the metrics of a run; exists only on rank 0.

    A resumed run continues all three outputs; records of steps that it will repeat are dropped.
    """

    def __init__(self, config: Config, resumed_step: int, commit: str) -> None:
        self.num_steps = config.train.steps
        self.run_dir = Path(config.run.dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        _drop_later_steps(self.run_dir / "metrics.jsonl", resumed_step)
        (self.run_dir / SETTINGS).write_text(f"# commit {commit}\n{config_toml(config)}")
        self._file = open(self.run_dir / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
        self.writer = SummaryWriter(
            str(self.run_dir / "tensorboard"), purge_step=resumed_step + 1, flush_secs=10
        )
        self.writer.add_text("config", f"```toml\n{config_toml(config)}```", resumed_step)
        self.writer.add_custom_scalars(_LAYOUT)
        self._started = time.perf_counter()
        self._first_step = resumed_step

    def announce(self, lines: list[str]) -> None:
        """Print the first lines of the log."""
        print("\n".join(lines), f"watch: tensorboard --logdir {self.writer.log_dir}", sep="\n")

    def log_step(self, step: int, record: dict[str, Any]) -> None:
        """Record optimizer step `step` (from 1); keys of numbers are TensorBoard tags."""
        self._file.write(json_text({"step": step, **record}) + "\n")
        for tag, value in record.items():
            if not isinstance(value, str):
                self.writer.add_scalar(tag, value, step)
        per_step = (time.perf_counter() - self._started) / (step - self._first_step)
        print(
            f"step {step:>{len(str(self.num_steps))}}/{self.num_steps} | "
            f"loss {record['train/loss']:.4f} | grad norm {record['train/grad_norm']:.3f} | "
            f"lr {record['train/lr']:.2e} | {record['perf/tokens_per_second']:,.0f} tokens/s | "
            f"MFU {record['perf/mfu']:.1%} | {record['perf/memory_gib']:.2f} GiB | "
            f"ETA {format_duration(per_step * (self.num_steps - step))}",
            flush=True,
        )

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self.writer.close()


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the records of metrics.jsonl; an incomplete last line is left out."""
    path = run_dir / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _drop_later_steps(path: Path, step: int) -> None:
    kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
    for left in path.parent.glob(f"{path.name}.*.tmp"):  # left by a start that was killed here
        left.unlink()
    disk.replace_file(path, "".join(json_text(record) + "\n" for record in kept).encode())
