"""Recall of the choice over all routed layers, for tables, plots and TensorBoard."""

from collections.abc import Sequence

from .results import Recall, RecallAt, Report


def recall_lengths(report: Report) -> list[int]:
    """Lengths at which recall was measured, in ascending order."""
    return sorted({found.length for found in report.recall})


def recall_of_all(report: Report, length: int) -> RecallAt:
    """Recall at a length over all layers and all keys beyond the window; `stop` is 0."""
    return _together(
        [
            RecallAt(start=0, stop=0, mass=r.beyond, chosen=r.chosen, best=r.best, random=r.random)
            for r in _layers(report, length)
        ]
    )


def recall_of_others(report: Report, length: int) -> RecallAt:
    """`recall_of_all` without the document's first block, which is always open."""
    return _together([layer_recall_of_others(layer) for layer in _layers(report, length)])


def layer_recall_of_others(layer: Recall) -> RecallAt:
    """Recall of one layer over all blocks except the document's first."""
    found = _together(layer.distances)
    return found.model_copy(update={"mass": found.mass * len(layer.distances)})


def recall_by_distance(report: Report, length: int) -> list[RecallAt]:
    """Recall in each distance bin over all layers, without the document's first block."""
    layers = [layer.distances for layer in _layers(report, length)]
    return [_together(bins) for bins in zip(*layers, strict=True)]


def _layers(report: Report, length: int) -> list[Recall]:
    return [found for found in report.recall if found.length == length]


def _together(parts: Sequence[RecallAt]) -> RecallAt:
    """Mean over layers or distances, weighted by their attention; `mass` is the plain mean."""
    mass = sum(part.mass for part in parts)

    def mean(name: str) -> float:
        held = sum(part.mass * getattr(part, name) for part in parts)
        return held / mass if mass else 1.0

    return RecallAt(
        start=parts[0].start,
        stop=parts[-1].stop,
        mass=mass / len(parts),
        chosen=mean("chosen"),
        best=mean("best"),
        random=mean("random"),
    )
