"""Trials of faults over NCCL: `python -m tests.reliability.nccl_trials FOLDER DATA [options]`.

A process of its own, since it forks ranks: it imports everything and must never touch a GPU itself.
Each trial does something to a tiny run (`nccl_faults.py`), starts it again, and compares every loss
and the final state with those of the undisturbed run. Prints one JSON line per trial. `--backend
gloo` does the same on a CPU.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Without it, asking whether there is a GPU makes CUDA unusable in forked processes.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch

from tests.reliability.harness import final_state, warm_up
from tests.reliability.nccl_faults import FULL_DISK, KINDS, MOVE, Trials


def run_trial(trials: Trials, number: int) -> dict[str, Any]:
    """One trial, and a start without fault that must end like the undisturbed run."""
    kind = list(KINDS)[number % len(KINDS)]
    stage = (number // len(KINDS)) % 4
    rng = random.Random(number)
    rank = rng.randrange(trials.ranks)
    config = trials.config(f"trial-{number}", stage)
    started, problem = time.monotonic(), ""
    try:
        KINDS[kind](trials, config, rank, rng)
        if kind not in (FULL_DISK, MOVE):
            trials.finish(config)
            assert final_state(config) == trials.expected(stage), "other losses or weights"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - started
    return {"trial": number, "kind": kind, "stage": stage, "rank": rank,
            "seconds": round(seconds, 1), "problem": problem}  # fmt: skip


def gpu_memory_used() -> list[int]:
    """MiB in use on each GPU, by nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return [int(line) for line in answer.split()]


def gpu_holders(ranks: set[int]) -> list[int]:
    """Those of `ranks` (process ids) that still hold GPU memory after 10 s; all have ended.

    Other processes may use the GPUs at the same time, so the memory in use does not tell.
    """
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    deadline = time.monotonic() + 10
    while True:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        holders = ranks & {int(line) for line in answer.split() if line.isdigit()}
        if not holders or time.monotonic() > deadline:
            return sorted(holders)
        time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--backend", default="nccl", choices=("nccl", "gloo"))
    parser.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    over_nccl = args.backend == "nccl"
    warm_up("cuda" if over_nccl else "cpu")
    assert not torch.cuda.is_initialized()
    args.folder.mkdir(parents=True, exist_ok=True)
    before = gpu_memory_used() if over_nccl else []
    trials = Trials(args.folder, args.data, args.ranks, over_nccl)
    stages = range(min(4, -(-args.trials // len(KINDS))))
    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(trials.expected, stages))

    def work(number: int) -> dict[str, Any] | None:
        return run_trial(trials, number) if time.monotonic() < deadline else None

    failed = 0
    with ThreadPoolExecutor(args.at_once) as pool:
        for outcome in pool.map(work, range(args.trials)):
            if outcome:
                failed += bool(outcome["problem"])
                print(json.dumps(outcome), flush=True)
    holders = gpu_holders(trials.pids) if over_nccl else []
    after = gpu_memory_used() if over_nccl else []
    print(json.dumps({"failed": failed, "ranks_on_gpus": holders, "memory_before": before,
                      "memory_after": after}), flush=True)  # fmt: skip
    shutil.rmtree(args.folder, ignore_errors=True)
    return 1 if failed or holders else 0


if __name__ == "__main__":
    sys.exit(main())
