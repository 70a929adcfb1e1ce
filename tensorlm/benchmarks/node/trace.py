"""The share of a step that ranks spend in exchanges, from the trace that `train.profile` writes."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

Interval = tuple[float, float]


class Exchanges(NamedTuple):
    """Shares of the traced step's time; waiting for another rank is included.

    zero: collectives of ZeRO (and of small values). rows: swaps and gathers of shared rows.
    exposed: time in either in which nothing else ran on the GPU.
    """

    zero: float
    rows: float
    exposed: float


def read_exchanges(run_dir: Path) -> Exchanges | None:
    """The exchanges in a run's trace, or None if it has no whole trace of GPU kernels."""
    try:
        [trace] = (run_dir / "profile").glob("*.json")
        events = json.loads(trace.read_text())["traceEvents"]
    except ValueError:  # none, or the run was ended while it wrote the trace
        return None
    kernels = [event for event in events if event.get("cat") == "kernel"]
    return summarize((which(event), event["ts"], event["ts"] + event["dur"]) for event in kernels)


def which(kernel: dict[str, Any]) -> str:
    """What a kernel of a trace does: "zero", "rows" or "compute"."""
    if not kernel["name"].startswith("nccl"):
        return "compute"
    # Shared rows travel as bytes: all-to-alls, which NCCL sends as pairs, and gathers.
    is_rows = "SendRecv" in kernel["name"] or kernel.get("args", {}).get("dtype") == "Byte"
    return "rows" if is_rows else "zero"


def summarize(kernels: Iterable[tuple[str, float, float]]) -> Exchanges | None:
    """Exchanges of kernels (what they do, start, end); None if there are no kernels."""
    zero: list[Interval] = []
    rows: list[Interval] = []
    compute: list[Interval] = []
    for kind, start, end in kernels:
        {"zero": zero, "rows": rows, "compute": compute}[kind].append((start, end))
    everything = union([*zero, *rows, *compute])
    if not everything:
        return None
    whole = everything[-1][1] - everything[0][0]
    exposed = length(everything) - length(union(compute))
    return Exchanges(length(union(zero)) / whole, length(union(rows)) / whole, exposed / whole)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in time as sorted intervals that do not overlap."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    """Total length of intervals that do not overlap."""
    return sum(end - start for start, end in intervals)
