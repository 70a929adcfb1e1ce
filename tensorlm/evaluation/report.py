"""What an evaluation leaves behind: report.json, a plot, TensorBoard scalars, a table."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from .perplexity import LengthResult


def write_report(
    folder: Path, results: list[LengthResult], facts: dict[str, Any], trained_length: int
) -> None:
    """Write `report.json` and `perplexity.png` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        **facts,
        "trained_length": trained_length,
        "perplexity": [asdict(result) for result in results],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    plot_perplexity(folder / "perplexity.png", results, trained_length)


def plot_perplexity(path: Path, results: list[LengthResult], trained_length: int) -> None:
    """Perplexity against context length, the trained length marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    lengths = [result.length for result in results]
    axes.plot(lengths, [result.perplexity for result in results], marker="o", color="tab:blue")
    axes.axvline(trained_length, color="tab:gray", linestyle="--", linewidth=1)
    axes.annotate(
        "trained length", (trained_length, 1), xycoords=("data", "axes fraction"),
        xytext=(4, -4), textcoords="offset points", va="top", color="tab:gray",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("perplexity")
    axes.set_title("The same held-out tokens at every length")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def log_to_tensorboard(run_dir: Path, step: int, results: list[LengthResult]) -> None:
    """Scalars `eval/ppl/<length>` at `step` in the run's own TensorBoard folder."""
    with SummaryWriter(str(run_dir / "tensorboard"), filename_suffix=".eval") as writer:
        for result in results:
            writer.add_scalar(f"eval/ppl/{result.length}", result.perplexity, step)


def format_table(results: list[LengthResult], trained_length: int) -> str:
    """A table for the terminal."""
    lines = [f"{'length':>9}  {'x trained':>9}  {'loss':>7}  {'perplexity':>10}  {'tokens':>9}"]
    for r in results:
        lines.append(
            f"{r.length:>9,}  {r.length / trained_length:>9.2f}  {r.loss:>7.4f}  "
            f"{r.perplexity:>10.3f}  {r.num_tokens:>9,}"
        )
    return "\n".join(lines)
