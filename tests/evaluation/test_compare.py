"""Joint reports: only what belongs together is joined, and nothing is lost."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tensorlm.evaluation.compare import compare_reports, merge_reports
from tensorlm.evaluation.describe import weights_digest
from tensorlm.evaluation.plots import figures
from tensorlm.evaluation.report import format_report, write_reports
from tensorlm.evaluation.results import (
    LengthResult,
    Mean,
    Ratio,
    Report,
    TaskScore,
    read_report,
)
from tensorlm.evaluation.tables import make_tables
from tensorlm.evaluation.text import choose_spans
from tensorlm.runtime.errors import UserError
from tests.support.forked import run_forked


class Documents:
    """Long documents and short ones: the longer the spans, the fewer documents."""

    lengths = np.array([8193] * 2 + [4097] * 4)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return 100_000 * document + np.arange(start, min(stop, self.lengths[document]))


def result(length: int, loss: float = 2.0, predicted: str = "a" * 64) -> LengthResult:
    return LengthResult(
        length=length, loss=loss, perplexity=float(np.exp(loss)), low=None, high=None,
        sliding_perplexity=None, num_tokens=1 << 14, num_documents=2, buckets=[],
        predicted=predicted,
    )  # fmt: skip


def report(*results: LengthResult, **facts: object) -> Report:
    return Report(
        name="/x/run", step=1, trained_length=4096, perplexity=list(results), facts=dict(facts)
    )


def test_what_was_predicted_is_known_by_its_tokens_and_documents() -> None:
    short, long = (choose_spans(Documents(), length, 1 << 14) for length in (4096, 8192))
    assert short.tokens[:, 1:].size == long.tokens[:, 1:].size
    assert short.sha256 != long.sha256
    assert short.sha256 == choose_spans(Documents(), 4096, 1 << 14).sha256
    assert short.sha256 != choose_spans(Documents(), 4096, 1 << 13).sha256


def test_equal_numbers_of_other_tokens_have_no_ratio() -> None:
    # Long documents are easy (1 nat a token), short ones hard (3 nats), whatever the context.
    parts = []
    for length in (4096, 8192):
        spans = choose_spans(Documents(), length, 1 << 14)
        loss = float(np.where(spans.document < 2, 1.0, 3.0).mean())
        parts.append(report(result(length, loss, spans.sha256)))
    (joined,) = merge_reports(parts)
    assert [r.length for r in joined.perplexity] == [4096, 8192]
    assert joined.ratios == []
    (note,) = joined.notes
    assert note.startswith(
        "no ratio of perplexity at 8,192 to that at 4,096 tokens: they predicted"
    )
    (table,) = make_tables([joined])
    assert [row[-1] for row in table.rows] == ["A", "B"]
    assert "different held-out tokens" in table.text
    (axes,) = figures([joined])["perplexity"].axes
    assert axes.get_title(loc="left") == "Perplexity, different held-out tokens at every length"


def test_reports_that_do_not_say_what_they_predicted_have_no_ratio() -> None:
    (joined,) = merge_reports([report(result(n, predicted="")) for n in (4096, 8192)])
    assert joined.ratios == []
    assert "an older report does not say" in joined.notes[0]
    assert [row[-1] for row in make_tables([joined])[0].rows] == ["?", "?"]


def test_equal_tokens_evaluated_apart_have_a_ratio() -> None:
    (joined,) = merge_reports([report(result(4096, 2.0)), report(result(8192, 1.9))])
    (ratio,) = joined.ratios
    assert (ratio.length, ratio.multiple) == (8192, 2)
    assert ratio.ratio.mean == pytest.approx(np.exp(-0.1))
    assert ratio.ratio.low is None
    assert joined.notes == []
    ratios, perplexity = make_tables([joined])
    assert ratios.rows == [["8,192", "2", "0.9048"]]
    assert "text" not in perplexity.header


def test_a_missing_trained_length_is_named() -> None:
    note = (
        "no ratios beyond the trained length: perplexity at 4,096 tokens was not measured "
        "(evaluate that length too)"
    )
    parts = [report(result(n)).model_copy(update={"notes": [note]}) for n in (8192, 16384)]
    (joined,) = merge_reports(parts)
    assert joined.ratios == []
    assert joined.notes == [note]
    (joined,) = merge_reports([*parts, report(result(4096))])
    assert [ratio.length for ratio in joined.ratios] == [8192, 16384]
    assert joined.notes == []


def test_a_measured_ratio_goes_with_the_results_that_it_is_of() -> None:
    ratio = Ratio(length=8192, multiple=2, ratio=Mean(mean=0.9, low=0.8, high=1.0))
    both = report(result(4096), result(8192)).model_copy(update={"ratios": [ratio]})
    (joined,) = merge_reports([both, report(result(16384))])
    assert joined.ratios[0] == ratio
    assert [r.length for r in joined.ratios] == [8192, 16384]
    # Another text at 8,192 tokens replaces what the ratio was of.
    (joined,) = merge_reports([both, report(result(8192, 1.0, "b" * 64))])
    assert joined.ratios == []
    assert len(joined.notes) == 1


def test_models_on_other_texts_are_not_compared() -> None:
    other = report(result(4096, predicted="b" * 64)).model_copy(update={"name": "/y/other"})
    (table,) = make_tables(merge_reports([report(result(4096)), other]))
    assert [row[-1] for row in table.rows] == ["A", "B"]


def test_scores_of_other_prompts_are_said_to_be_others() -> None:
    def scores(length: int, version: str) -> Report:
        score = TaskScore(task="vt", length=length, score=0.5, num_samples=4, version=version)
        return Report(name="/x/run", step=1, trained_length=4096, ruler=[score])

    def text(*reports: Report) -> str:
        (table,) = make_tables(merge_reports(list(reports)))
        return table.text

    assert text(scores(4096, "new"), scores(8192, "new")).startswith(
        "Prompts and scoring of new. S"
    )
    mixed = text(scores(4096, "new"), scores(8192, ""))
    assert "of an older, unknown version and of new. Scores of different prompts are not" in mixed


# ---------------------------------------------------------------------------------------- models


def test_reports_of_random_weights_stay_apart() -> None:
    parts = [
        Report(
            name="/x/run/random weights", trained_length=4096, facts={"output": f"/x/run/{folder}"},
            perplexity=[result(4096, loss)],
        )
        for folder, loss in (("small", 7.0), ("large", 8.0))
    ]  # fmt: skip
    joined = merge_reports(parts)
    assert joined == parts
    table = format_report(joined)
    assert "random weights (small)" in table
    assert "random weights (large)" in table


def test_a_folder_that_was_overwritten_is_another_model() -> None:
    def part(weights: str, length: int) -> Report:
        return Report(
            name="/x/hf", trained_length=4096, weights=weights, perplexity=[result(length)]
        )

    first, second = merge_reports([part("a", 4096), part("b", 4096), part("a", 8192)])
    assert [r.length for r in first.perplexity] == [4096, 8192]
    assert [r.length for r in second.perplexity] == [4096]
    table = format_report([first, second])
    assert "hf (#1)" in table
    assert "hf (#2)" in table


def test_any_changed_parameter_changes_the_digest() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 200), torch.nn.LayerNorm(7))
    digests = {weights_digest(network)}
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.mul_(1.001).add_(1e-4)
        digests.add(weights_digest(network))
    assert len(digests) == 5
    assert weights_digest(network.double().float()) in digests


@pytest.mark.parametrize("num", [49152 * 576, 128256 * 4096])
def test_a_parameter_has_a_digest_where_float32_does_not_count_its_elements(num: int) -> None:
    network = torch.nn.Module()
    network.weight = torch.nn.Parameter(torch.zeros(1).expand(num))  # takes no memory
    assert len(weights_digest(network)) == 64


# --------------------------------------------------------------------------------------- folders


def write_parts(folder: Path) -> None:
    for length in (4096, 8192):
        part = report(result(length), commands=[f"python evaluate.py --lengths {length}"])
        score = TaskScore(task="vt", length=length, score=0.5, num_samples=4)
        write_reports(folder / str(length), [part.model_copy(update={"ruler": [score]})])


def test_the_output_is_checked_before_reports_are_read(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part/report.json").write_text("damaged")
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file/out", Path("/proc/out")):
        with pytest.raises(UserError, match="cannot be written") as caught:
            compare_reports([tmp_path / "part"], output)
        assert caught.value.problems[0].startswith(f"{output}: ")


def test_comparing_does_not_replace_what_it_compares(tmp_path: Path) -> None:
    write_parts(tmp_path)
    before = (tmp_path / "4096/report.json").read_bytes()
    with pytest.raises(UserError, match=r"--output: must not contain a report to compare, .*4096"):
        compare_reports([tmp_path], tmp_path / "4096")
    assert (tmp_path / "4096/report.json").read_bytes() == before


def test_an_earlier_joint_report_is_no_part_of_the_next(tmp_path: Path) -> None:
    write_parts(tmp_path)
    compare_reports([tmp_path], tmp_path / "all")
    write_reports(tmp_path / "8192", [report(result(8192, 1.0))])  # evaluated again, later
    assert "0.3679" in compare_reports([tmp_path, tmp_path], tmp_path / "all")
    joined = read_report(tmp_path / "all/report.json")
    assert joined.perplexity[1].loss == 1.0
    assert [score.length for score in joined.ruler] == [4096]  # no longer that of 8192
    page = (tmp_path / "all/report.html").read_text()
    assert "python evaluate.py --lengths 4096" in page


def test_a_joint_report_of_several_models_leaves_no_older_json(tmp_path: Path) -> None:
    write_parts(tmp_path / "parts")
    compare_reports([tmp_path / "parts"], tmp_path / "all")
    other = report(result(4096)).model_copy(update={"name": "/y/other"})
    write_reports(tmp_path / "parts/other", [other])
    compare_reports([tmp_path / "parts"], tmp_path / "all")
    assert not (tmp_path / "all/report.json").exists()


def test_launcher_names_a_missing_folder_and_prints_why_there_is_no_ratio(tmp_path: Path) -> None:
    for length in (4096, 8192):
        write_reports(tmp_path / str(length), [report(result(length, predicted=str(length)))])

    output = ("--output", str(tmp_path / "all"))
    done = run_forked("evaluate.py", "--compare", str(tmp_path), *output)
    assert done.returncode == 0, done.stderr
    assert "no ratio of perplexity at 8,192 to that at 4,096 tokens" in done.stdout
    assert "Beyond the trained length" not in done.stdout
    assert json.loads((tmp_path / "all/report.json").read_text())["ratios"] == []
    failed = run_forked("evaluate.py", "--compare", str(tmp_path / "nothing"), *output)
    assert failed.returncode == 2
    assert "--compare: must be folders, got " in failed.stderr
    assert os.path.exists(tmp_path / "all/report.html")
