"""The report: complete, readable by itself, joined from parts, refused when damaged."""

import re
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from tensorlm.evaluation.compare import merge_reports
from tensorlm.evaluation.plots import FIGURES, figures
from tensorlm.evaluation.report import format_report, log_to_tensorboard, write_reports
from tensorlm.evaluation.results import (
    Bucket,
    Cell,
    ContextGain,
    Cost,
    Example,
    Gain,
    LengthResult,
    Mean,
    Ratio,
    Recall,
    RecallAt,
    Report,
    TaskScore,
    read_report,
)
from tensorlm.runtime.errors import UserError


def make_report(name: str, lengths: tuple[int, ...], accuracy: float = 0.5) -> Report:
    """A report with something in every section."""
    mean = Mean(mean=2.0, low=1.9, high=2.1)
    shares = {"chosen": 0.5, "best": 0.75, "random": 0.25}
    bins = [RecallAt(start=1024, stop=8192, mass=0.25, **shares)]
    gain = Gain(start=4096, stop=8192, near_loss=2.1, full_loss=2.0, gain=mean)
    return Report(
        name=name,
        step=30,
        trained_length=4096,
        facts={"device": "<CPU & more>"},
        perplexity=[
            LengthResult(
                length=n, loss=2.0, perplexity=7.389, low=7.0, high=7.7,
                sliding_perplexity=None if n == lengths[-1] else 7.2, num_tokens=1 << 20,
                num_documents=9, buckets=[Bucket(start=0, stop=n, loss=mean)],
            )
            for n in lengths
        ],
        ratios=[Ratio(length=8192, multiple=2, ratio=mean)],
        attribution=[ContextGain(length=8192, near=4096, total=gain, buckets=[gain, gain])],
        recall=[
            Recall(
                length=n, layer=layer, num_queries=64, beyond=0.125 * (1 + layer),
                first=0.5, chosen=0.25 + 0.25 * layer, best=0.75, random=0.25, opened=17,
                distances=bins,
            )
            for n in lengths
            for layer in (0, 2)
        ],
        passkey=[Cell(length=n, depth=0.5, accuracy=accuracy, num_samples=4) for n in lengths],
        niah=[Cell(length=n, depth=d, accuracy=d, num_samples=4) for n in lengths for d in (0, 1)],
        ruler=[
            TaskScore(task="vt", length=n, score=0.25, num_samples=8) for n in lengths
        ],
        costs=[Cost(what="niah", length=n, seconds=61.5, memory_gib=70.25) for n in lengths],
        examples=[Example(task="vt", length=64, answers=["<a>"], prediction="&\n", score=0)],
    )  # fmt: skip


def test_page_is_whole_without_any_other_file(tmp_path: Path) -> None:
    write_reports(tmp_path, [make_report("runs/a", (4096, 8192))])
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:image/png;base64,)""", page)
    assert "http" not in page
    assert "<script" not in page
    assert page.count("<img ") == 8
    assert "&lt;CPU &amp; more&gt;" in page
    assert "expected: &lt;a&gt;" in page
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Evaluation of a step 30")
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (
        "| 8,192 | all | 25.0% | 62.5% | 75.0% | 25.0% |" in text
    )  # (0.125 * 25 + 0.375 * 75) / 0.5
    assert "| 8,192 | 1,024 - 8,192 | 25.0% | 50.0% | 75.0% | 25.0% |" in text
    assert "| 2 | 8,192 | 37.5% | 50.0% | 50.0% | 75.0% | 25.0% | 17.0 |" in text
    assert "| 8,192 | 2.00 | 2.0000 | 7.389 | 7.000 - 7.700 |" in text


def test_a_report_replaces_an_earlier_one_with_its_plots(tmp_path: Path) -> None:
    (tmp_path / "ruler.png").write_text("mine")
    earlier = make_report("a", (4096, 8192))
    write_reports(tmp_path, [earlier.model_copy(update={"ruler": []})])
    assert (tmp_path / "ruler.png").read_text() == "mine"  # no report was there
    write_reports(tmp_path, [earlier])
    (tmp_path / "mine.png").write_text("mine")
    written = {f"{name}.png" for name in FIGURES}
    assert written == set(re.findall(r"\]\((.*?)\)", (tmp_path / "report.md").read_text()))
    write_reports(tmp_path, [Report(name="a", trained_length=4096, passkey=earlier.passkey)])
    assert {path.name for path in tmp_path.glob("*.png")} == {"passkey.png", "mine.png"}


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    report = make_report("a", (4096,))
    diverged = report.model_copy(
        update={"ratios": [Ratio(length=8192, multiple=2, ratio=Mean(mean=float("nan")))]}
    )
    diverged.write(tmp_path)
    assert "NaN" in (tmp_path / "report.json").read_text()
    assert repr(read_report(tmp_path / "report.json")) == repr(diverged)


@pytest.mark.parametrize(
    "content", ["{", '{"name": "a"}', '{"name": "a", "trained_length": 1, "x": 2}']
)
def test_damaged_report_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"report.json: not a report: ") as caught:
        read_report(path)
    assert len(caught.value.problems) == 1


def test_lengths_of_one_model_join_and_models_stay_apart() -> None:
    parts = [make_report("a", (8192,)), make_report("a", (4096,)), make_report("b", (4096,), 1.0)]
    first, second = merge_reports(parts)
    assert [result.length for result in first.perplexity] == [4096, 8192]
    assert [score.length for score in first.ruler] == [4096, 8192]
    assert second == parts[2]
    assert [cost.length for cost in first.costs] == [4096, 8192]
    assert [(r.length, r.layer) for r in first.recall] == [
        (4096, 0),
        (4096, 2),
        (8192, 0),
        (8192, 2),
    ]
    table = format_report([first, second])
    assert re.search(r"a step 30 +passkey +8,192 +50.0%", table)
    assert re.search(r"b step 30 +passkey +4,096 +100.0%", table)


def test_folders_of_one_name_are_models_of_their_own(tmp_path: Path) -> None:
    paths = ("/x/big/hf", "/x/small/hf", "/y/base")
    parts = [make_report(path, (4096,), accuracy=i / 4) for i, path in enumerate(paths)]
    reports = merge_reports(parts)
    assert reports == parts
    table = format_report(reports)
    for name, accuracy in (("big/hf", "0.0%"), ("small/hf", "25.0%"), ("base", "50.0%")):
        assert re.search(rf"^ *{name} step 30 +passkey +4,096 +{accuracy}", table, re.MULTILINE)
    write_reports(tmp_path, reports)
    title = "Evaluation of big/hf step 30, small/hf step 30, base step 30"
    assert f"<h1>{title}</h1>" in (tmp_path / "report.html").read_text()
    write_reports(tmp_path, reports[:1])
    assert "<h1>Evaluation of hf step 30</h1>" in (tmp_path / "report.html").read_text()
    assert read_report(tmp_path / "report.json").name == "/x/big/hf"


def test_recall_is_given_with_and_without_the_first_block() -> None:
    report = make_report("a", (4096, 8192))
    table = format_report([report])
    assert re.search(r"8,192 +all +25.0% +62.5% +75.0% +25.0%", table)
    assert re.search(r"8,192 +all but the first block +25.0% +50.0% +75.0% +25.0%", table)
    by_layer, _ = figures([report])["recall"].axes
    shares = [np.asarray(line.get_ydata()).tolist() for line in by_layer.lines]
    assert shares == [[0.5, 0.5], [0.75, 0.75], [0.25, 0.25]]  # chosen, best, random


def test_perplexity_curve_marks_every_trained_length() -> None:
    reports = [make_report("a", (4096, 8192)), make_report("b", (4096, 8192))]
    reports[1] = reports[1].model_copy(update={"trained_length": 8192})
    (axes,) = figures(reports)["perplexity"].axes
    dashed = [line.get_xdata() for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == [[4096, 4096], [8192, 8192]]
    assert [text.get_text() for text in axes.texts] == ["trained length"] * 2


def test_tensorboard_has_the_scalars_and_figures(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        log_to_tensorboard(writer, make_report("a", (4096, 8192)), 30)
    events = EventAccumulator(str(tmp_path)).Reload()
    (point,) = events.Scalars("eval/ppl/8192")
    assert (point.step, point.value) == (30, pytest.approx(7.389))
    assert {"eval/gain/8192", "eval/ruler/vt/4096", "eval/passkey/4096"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Scalars("eval/recall/8192")[0].value == pytest.approx(0.625)
    assert events.Scalars("eval/recall_best/4096")[0].value == pytest.approx(0.75)
    assert events.Scalars("eval/recall_without_first/8192")[0].value == pytest.approx(0.5)
    assert events.Scalars("eval/recall_random_without_first/8192")[0].value == pytest.approx(0.25)
    assert {"eval/recall", "eval/needle", "eval/perplexity", "eval/attribution"} <= set(
        events.Tags()["images"]
    )
