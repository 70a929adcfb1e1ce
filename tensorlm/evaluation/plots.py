"""The figures of a report; several reports are shown side by side, or as lines of one plot."""

from collections.abc import Callable
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .names import label
from .recall_summary import layer_recall_of_others, recall_by_distance, recall_lengths
from .results import Cell, LengthResult, Mean, Report, same_tokens

FIGURES = ("ratio", "perplexity", "positions", "attribution", "recall", "passkey", "niah", "ruler")
_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
_LEAST_CHANGE = 1.0  # percent: on a shorter axis, noise would look like an effect


def figures(reports: list[Report]) -> dict[str, Figure]:
    """All figures for which these reports have numbers, by file name without suffix."""
    makers: dict[str, Callable[[list[Report]], Figure]] = {
        "ratio": _ratio,
        "perplexity": _perplexity,
        "positions": _positions,
        "attribution": _context_gain,
        "recall": _recall,
        "passkey": lambda these: _heat_maps(these, "passkey", "Passkey"),
        "niah": lambda these: _heat_maps(these, "niah", "Needle in a haystack"),
        "ruler": _ruler,
    }
    content = {"ratio": "ratios", "positions": "perplexity"}
    made = {}
    for name, make in makers.items():
        having = [report for report in reports if getattr(report, content.get(name, name))]
        if having:
            made[name] = make(having)
    return made


def _axes(title: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _length_axis(axes: Axes, lengths: list[int], name: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_short(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel(name)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def _band(axes: Axes, x: list[int], means: list[Mean], color: str) -> None:
    if all(mean.low is not None for mean in means):
        low, high = [m.low for m in means], [m.high for m in means]
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)  # type: ignore[arg-type]


def _ratio(reports: list[Report]) -> Figure:
    """Change of perplexity relative to the trained length, on the same tokens."""
    figure, axes = _axes(
        "Perplexity beyond the trained length, on the same tokens", "change of perplexity (%)"
    )
    lengths: set[int] = set()
    extremes = [-_LEAST_CHANGE, _LEAST_CHANGE]
    for report, color in zip(reports, cycle(_COLORS), strict=False):
        x = [report.trained_length, *(ratio.length for ratio in report.ratios)]
        changes = [Mean(mean=0, low=0, high=0), *(_change(r.ratio) for r in report.ratios)]
        axes.plot(x, [change.mean for change in changes], "o-", color=color, label=label(report))
        _band(axes, x, changes, color)
        for length, change in zip(x[1:], changes[1:], strict=True):
            axes.annotate(
                f"{change.mean:+.2f} %", (length, change.mean), xytext=(0, 8), ha="center",
                textcoords="offset points", color=color, fontsize=9,
            )  # fmt: skip
            extremes += [v for v in (change.mean, change.low, change.high) if v is not None]
        lengths |= set(x)
    finite = [value for value in extremes if np.isfinite(value)]
    margin = 0.15 * (max(finite) - min(finite))
    axes.set_ylim(min(finite) - margin, max(finite) + margin)
    axes.axhline(0, color="tab:gray", linewidth=1)
    _mark_trained_lengths(axes, reports)
    _length_axis(axes, sorted(lengths), "context length (tokens)")
    axes.legend(fontsize=8, loc="lower left")
    return figure


def _change(ratio: Mean) -> Mean:
    """The change of a ratio from 1, in percent."""

    def percent(value: float | None) -> float | None:
        return None if value is None else 100 * (value - 1)

    return Mean(mean=100 * (ratio.mean - 1), low=percent(ratio.low), high=percent(ratio.high))


def _mark_trained_lengths(axes: Axes, reports: list[Report]) -> None:
    for trained in sorted({report.trained_length for report in reports}):
        axes.axvline(trained, color="tab:gray", linestyle="--", linewidth=1)
        axes.annotate(
            "trained length", (trained, 1), xycoords=("data", "axes fraction"), xytext=(4, -4),
            textcoords="offset points", va="top", color="tab:gray",
        )  # fmt: skip


def _perplexity(reports: list[Report]) -> Figure:
    tokens = "the same held-out tokens" if same_tokens(reports) else "different held-out tokens"
    figure, axes = _axes(f"Perplexity, {tokens} at every length", "perplexity")
    axes.ticklabel_format(axis="y", useOffset=False)
    for report, color in zip(reports, cycle(_COLORS), strict=False):
        found = report.perplexity
        lengths = [r.length for r in found]
        whole = [r.perplexity for r in found]
        axes.plot(lengths, whole, "o-", color=color, label=label(report))
        slid = [(r.length, r.sliding_perplexity) for r in found if r.sliding_perplexity]
        if slid:
            name = f"{label(report)}, sliding"
            axes.plot(*zip(*slid, strict=True), "o:", color=color, markersize=4, label=name)
    # Documents differ more than lengths: their interval (in the table) would hide the curve.
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, 0.98 * top), max(top, 1.02 * bottom))
    _mark_trained_lengths(axes, reports)
    lengths = sorted({r.length for report in reports for r in report.perplexity})
    _length_axis(axes, lengths, "context length (tokens)")
    axes.legend(fontsize=8)
    return figure


def _positions(reports: list[Report]) -> Figure:
    figure, axes = _axes("Loss by position in the window", "loss (nats per token)")
    edges: set[int] = set()
    for report, color in zip(reports, cycle(_COLORS), strict=False):
        for result in report.perplexity[:-1]:
            stops, losses = _by_position(result)
            axes.plot(stops, [loss.mean for loss in losses], "-", color=color, alpha=0.3)
        longest = report.perplexity[-1]
        stops, losses = _by_position(longest)
        name = f"{label(report)}, {_short(longest.length)}"
        axes.plot(stops, [loss.mean for loss in losses], "o-", color=color, label=name)
        _band(axes, stops, losses, color)
        edges |= set(stops)
    _length_axis(axes, sorted(edges), "position up to (tokens); faint: shorter windows")
    axes.legend(fontsize=8)
    return figure


def _by_position(result: LengthResult) -> tuple[list[int], list[Mean]]:
    return [bucket.stop for bucket in result.buckets], [bucket.loss for bucket in result.buckets]


def _context_gain(reports: list[Report]) -> Figure:
    figure, axes = _axes(
        "Gain from the context beyond the last tokens", "loss reduction (nats per token)"
    )
    edges = set()
    for report, color in zip(reports, cycle(_COLORS), strict=False):
        last = report.attribution[-1]
        stops = [bucket.stop for bucket in last.buckets]
        gains = [bucket.gain for bucket in last.buckets]
        name = f"{label(report)}: {_short(last.length)} against the last {_short(last.near)}"
        axes.plot(stops, [gain.mean for gain in gains], "o-", color=color, label=name)
        _band(axes, stops, gains, color)
        edges |= set(stops)
    axes.axhline(0, color="tab:gray", linewidth=1)
    _length_axis(axes, sorted(edges), "position up to (tokens)")
    axes.legend(fontsize=8)
    return figure


def _recall(reports: list[Report]) -> Figure:
    """Recall by layer, and by distance over all layers, at each report's longest length.

    Without the document's first block: it is always open, and would hide what the choice does.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_layer, by_distance = figure.subplots(1, 2, sharey=True)
    edges: set[int] = set()
    for report, color in zip(reports, cycle(_COLORS), strict=False):
        length = recall_lengths(report)[-1]
        layers = [found for found in report.recall if found.length == length]
        others = [layer_recall_of_others(found) for found in layers]
        bins = recall_by_distance(report, length)
        for name, style in (("chosen", "o-"), ("best", "--"), ("random", ":")):
            text = f"{label(report)}, {_short(length)}: {name}"
            shares = [getattr(found, name) for found in others]
            by_layer.plot(
                [r.layer for r in layers], shares, style, color=color, label=text, markersize=4
            )
            shares, stops = [getattr(found, name) for found in bins], [r.stop for r in bins]
            by_distance.plot(stops, shares, style, color=color, markersize=4)
        edges |= {found.stop for found in bins}
    for axes, text in (
        (by_layer, "Share of attention in open blocks, except the first block"),
        (by_distance, "The same by distance"),
    ):
        axes.set_title(text, loc="left", fontsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_layer.set_ylim(-0.02, 1.02)
    by_layer.set_ylabel("recall")
    by_layer.set_xlabel("layer")
    by_layer.legend(fontsize=8)
    _length_axis(by_distance, sorted(edges), "distance up to (tokens)")
    return figure


def _heat_maps(reports: list[Report], name: str, title: str) -> Figure:
    figure = Figure(figsize=(0.6 + 4.6 * len(reports), 3.8), layout="constrained")
    panels = figure.subplots(1, len(reports), squeeze=False)[0]
    for axes, report in zip(panels, reports, strict=True):
        cells: list[Cell] = getattr(report, name)
        lengths = sorted({cell.length for cell in cells})
        depths = sorted({cell.depth for cell in cells})
        grid = np.full((len(depths), len(lengths)), np.nan)
        for cell in cells:
            grid[depths.index(cell.depth), lengths.index(cell.length)] = cell.accuracy
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("context length (tokens)")
        axes.set_ylabel("depth of the needle")
        axes.set_title(f"{title}: {label(report)}", fontsize=9)
    figure.colorbar(image, ax=panels, label="accuracy")
    return figure


def _ruler(reports: list[Report]) -> Figure:
    figure, axes = _axes("RULER, mean over the tasks", "score")
    every = set()
    for report, color in zip(reports, cycle(_COLORS), strict=False):
        lengths = sorted({score.length for score in report.ruler})
        means = [np.mean([s.score for s in report.ruler if s.length == n]) for n in lengths]
        axes.plot(lengths, means, "o-", color=color, label=label(report))
        every |= set(lengths)
    axes.set_ylim(-0.02, 1.02)
    _length_axis(axes, sorted(every), "context length (tokens)")
    axes.legend(fontsize=8)
    return figure
