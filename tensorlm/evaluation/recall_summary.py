"""Recall of the choice over all routed layers, for tables, plots and TensorBoard."""

from .results import RecallAt, Report


def recall_lengths(report: Report) -> list[int]:
    """Lengths at which recall was measured, in ascending order."""
    return sorted({found.length for found in report.recall})


def recall_of_all(report: Report, length: int) -> RecallAt:
    """Recall at a length over all layers and all keys beyond the window; `stop` is 0."""
    return _together(
        [
            RecallAt(start=0, stop=0, mass=r.beyond, chosen=r.chosen, best=r.best, random=r.random)
            for r in report.recall
            if r.length == length
        ]
    )


def recall_by_distance(report: Report, length: int) -> list[RecallAt]:
    """`recall_of_all`, followed by each distance bin."""
    layers = [found.distances for found in report.recall if found.length == length]
    return [
        recall_of_all(report, length),
        *(_together(list(bins)) for bins in zip(*layers, strict=True)),
    ]


def _together(layers: list[RecallAt]) -> RecallAt:
    """Mean over layers, weighted by their attention."""
    mass = sum(layer.mass for layer in layers)

    def mean(name: str) -> float:
        held = sum(layer.mass * getattr(layer, name) for layer in layers)
        return held / mass if mass else 1.0

    return RecallAt(
        start=layers[0].start,
        stop=layers[0].stop,
        mass=mass / len(layers),
        chosen=mean("chosen"),
        best=mean("best"),
        random=mean("random"),
    )
