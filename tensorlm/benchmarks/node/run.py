"""Run the parts one after another, and print and write each row as soon as it is known."""

import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tensorlm.runtime.arguments import write_json

from ..markdown import table_head, table_row
from . import evaluation, longest, starters, training
from .host import Host
from .training import Row

PARTS: dict[str, Callable[[Host], Iterator[Row]]] = {
    "train": training.measure,
    "starters": starters.measure,
    "longest": longest.measure,
    "evaluation": evaluation.measure,
}


def measure(host: Host, parts: Sequence[str], file: Path | None) -> None:
    """Measure `parts`; on a signal, or at the limit, what is there stays printed and written."""
    results: dict[str, Any] = {"host": describe(host), "rows": {part: [] for part in parts}}
    print(results["host"], flush=True)
    host.listen()
    host.prepare_data()
    for part in parts:
        if not host.seconds_left:
            print(f"\n{part}: not measured, out of time", flush=True)
            continue
        print(f"\n## {part}\n", flush=True)
        head: list[str] = []
        for row in PARTS[part](host):
            results["rows"][part].append(row)
            write_json(file, results)
            if list(row) != head:
                head = list(row)
                print(table_head(head))
            print(table_row([format_value(value) for value in row.values()]), flush=True)


def describe(host: Host) -> str:
    """The machine and the versions of what was measured."""
    name = torch.cuda.get_device_name() if host.on_gpu else f"CPU ranks ({platform.machine()})"
    return f"{host.ranks} x {name}, torch {torch.__version__}"


def format_value(value: Any) -> str:
    """A cell: numbers with three significant digits, or without decimals from 1,000 on."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
