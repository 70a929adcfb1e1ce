"""What a run leaves for people and their tools: metrics.jsonl as JSON, the page of TensorBoard."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from tensorlm.config import load_config
from tensorlm.runtime.strict_json import json_text
from tensorlm.train.metrics import Metrics, read_metrics

LAYOUT_TAG = "custom_scalars__config__"


def refuse(text: str) -> NoReturn:
    raise AssertionError(f"{text} is not JSON")


def strictly(text: str) -> Any:
    """Read JSON as readers other than Python's do."""
    return json.loads(text, parse_constant=refuse)


def record(**values: Any) -> dict[str, Any]:
    usual = {
        "train/loss": 1.0, "train/grad_norm": 2.0, "train/lr": 1e-3,
        "perf/tokens_per_second": 1.0, "perf/mfu": 0.1, "perf/memory_gib": 0.1,
    }  # fmt: skip
    return usual | values


def test_metrics_of_a_step_that_is_not_finite_are_json(config: Path) -> None:
    settings = load_config(config)
    metrics = Metrics(settings, 0, "commit")
    metrics.log_step(1, record(**{"train/loss": math.nan, "train/grad_norm": math.inf}))
    metrics.log_step(2, record())
    metrics.close()
    path = Path(settings.run.dir) / "metrics.jsonl"
    first, second = (strictly(line) for line in path.read_text().splitlines())
    assert (first["step"], first["train/loss"], first["train/grad_norm"]) == (1, None, None)
    assert second == {"step": 2, **record()}
    # Written by an earlier version, and continued by this one.
    path.write_text('{"step": 1, "train/loss": NaN}\n')
    Metrics(settings, 1, "commit").close()
    assert strictly(path.read_text()) == {"step": 1, "train/loss": None}
    assert read_metrics(path.parent) == [{"step": 1, "train/loss": None}]


def test_json_of_nested_values_is_that_of_python_but_for_numbers_that_are_not_finite() -> None:
    class Row(NamedTuple):
        seconds: float
        length: int

    value = {"rows": [Row(math.nan, 1)._asdict(), Row(0.1, 2)._asdict()], 7: (-math.inf, True, "a")}
    assert strictly(json_text(value)) == {
        "rows": [{"seconds": None, "length": 1}, {"seconds": 0.1, "length": 2}],
        "7": [None, True, "a"],
    }
    plain = {"a": [1, 2.5, None, {"b": "NaN"}]}
    assert json_text(plain, indent=1) == json.dumps(plain, indent=1)


def test_custom_page_of_tensorboard_begins_with_the_loss(config: Path) -> None:
    settings = load_config(config)
    for resumed in (0, 2):  # a resumed run has the page, too
        metrics = Metrics(settings, resumed, "commit")
        metrics.log_step(resumed + 1, record())
        metrics.close()
    events = EventAccumulator(f"{settings.run.dir}/tensorboard").Reload()
    (summary,) = {event.tensor_proto.string_val[0] for event in events.Tensors(LAYOUT_TAG)}
    layout = layout_pb2.Layout.FromString(summary)
    charts = [chart for category in layout.category for chart in category.chart]
    assert list(charts[0].multiline.tag) == ["train/loss"]
    shown = [tag for chart in charts for tag in chart.multiline.tag]
    assert {*record()} <= {*shown}
    assert [tag for tag in shown if tag.startswith("data/")] == []
