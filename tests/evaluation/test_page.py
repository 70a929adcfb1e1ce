"""A report that a stranger understands: what was evaluated, on what, how, and what was found."""

from pathlib import Path

import torch

from fold_parallel import Grid
from tensorlm.config import load_config
from tensorlm.evaluation.launch import evaluate_on_ranks
from tensorlm.evaluation.model import open_random_model
from tensorlm.evaluation.plots import figures
from tensorlm.evaluation.report import format_report, write_reports
from tensorlm.evaluation.results import LengthResult, Mean, Ratio, Report, read_report
from tensorlm.evaluation.summary import headline, title
from tensorlm.evaluation.tables import make_tables
from tensorlm.runtime.launch_env import LaunchEnv
from tests.evaluation.solver import save_untrained, write_inputs

FACTS = {
    "parameters": 1_311_888, "attention": "fold [256]", "trained_tokens": 1_308_342,
    "text": "valid split of runs/demo/data", "date": "2026-07-01 12:00 UTC", "device": "CPU",
    "commands": ["python launcher/evaluate.py --config c.toml"], "seconds": 75.0,
}  # fmt: skip


def make_report() -> Report:
    results = [
        LengthResult(
            length=n, loss=4.5, perplexity=97.0, low=21.9, high=171.0, sliding_perplexity=None,
            num_tokens=98_304, num_documents=3, buckets=[], predicted="a",
        )
        for n in (4096, 8192, 16384)
    ]  # fmt: skip
    ratios = [
        Ratio(length=8192, multiple=2, ratio=Mean(mean=1.0006, low=1.0003, high=1.0011)),
        Ratio(length=16384, multiple=4, ratio=Mean(mean=1.0013, low=0.9997, high=1.0024)),
    ]
    return Report(
        name="/work/runs/demo/train", step=160, trained_length=4096, facts=FACTS,
        perplexity=results, ratios=ratios,
    )  # fmt: skip


def test_the_finding_comes_first_in_words_and_as_a_plot(tmp_path: Path) -> None:
    report = make_report()
    sentence = (
        "With 4 times the context of training (16,384 instead of 4,096 tokens), perplexity is "
        "0.13 % higher (95 % interval: -0.03 % to +0.24 %), on the same 98,304 held-out tokens."
    )
    assert headline(report) == sentence
    assert format_report([report]).endswith(f"\n\n{sentence}")
    write_reports(tmp_path, [report])
    for name in ("report.html", "report.md"):
        page = (tmp_path / name).read_text()
        assert sentence in page
        assert page.index(sentence) < page.index("Beyond the trained length")
        assert page.index("Beyond the trained length") < page.index("Perplexity by length")
    page = (tmp_path / "report.html").read_text()
    assert page.index('alt="ratio"') < page.index('alt="perplexity"')
    (axes,) = figures([report])["ratio"].axes
    assert axes.lines[0].get_xdata().tolist() == [4096, 8192, 16384]  # type: ignore[union-attr]
    low, high = axes.get_ylim()
    assert -3 < low < -1 < 1 < high < 3  # 0.13 % is seen to be little, and to be


def test_a_model_that_diverged_has_a_report(tmp_path: Path) -> None:
    nothing = Ratio(length=16384, multiple=4, ratio=Mean(mean=float("nan")))
    report = make_report().model_copy(update={"ratios": [nothing]})
    write_reports(tmp_path, [report])
    assert (headline(report) or "").endswith("perplexity is not a number.")


def test_a_reader_learns_what_was_evaluated_and_how(tmp_path: Path) -> None:
    write_reports(tmp_path, [make_report()])
    assert read_report(tmp_path / "report.json") == make_report()
    for name in ("report.html", "report.md"):
        page = (tmp_path / name).read_text()
        assert "Evaluation of demo/train step 160: 1.31 M parameters, fold [256]" in page
        for part in (
            "1.31 M (1,311,888)", "1,308,342 tokens", "length of 4,096 tokens", "1m15s",
            "valid split of runs/demo/data; 98,304 tokens of 3 documents predicted",
            "2026-07-01 12:00 UTC", "python launcher/evaluate.py --config c.toml",
        ):  # fmt: skip
            assert part in page, part


def test_nothing_is_a_column_of_dashes() -> None:
    (ratios, perplexity) = make_tables([make_report()])
    assert ratios.header == ["length", "x trained", "ratio (95 %)"]
    assert perplexity.header == [
        "length", "x trained", "loss", "perplexity", "95 %", "tokens", "documents",
    ]  # fmt: skip
    assert "liding" not in perplexity.text


def test_several_models_are_columns_of_facts(tmp_path: Path) -> None:
    other = make_report().model_copy(update={"name": "/work/hf", "step": None, "facts": {}})
    reports = [make_report(), other]
    write_reports(tmp_path, reports)
    page = (tmp_path / "report.html").read_text()
    assert "<h1>Evaluation of demo/train step 160, hf</h1>" in page
    assert "<td>1.31 M (1,311,888)</td><td>unknown</td>" in page


def test_launcher_describes_the_model_and_the_call(tmp_path: Path) -> None:
    config = load_config(write_inputs(tmp_path), ["eval.lengths=[90]", "eval.max_tokens=900"])
    save_untrained(config)
    alone = LaunchEnv(0, 1, 0, 1, "127.0.0.1", 0)
    assert evaluate_on_ranks(config, alone, None, None, False, None) == 0
    facts = read_report(Path(config.run.dir) / "eval/step-00000000/report.json").facts
    assert facts["attention"] == "fold [32]"
    assert facts["trained_tokens"] == 0
    assert "not in this run" in (Path(facts["output"]) / "report.html").read_text()
    assert facts["text"] == config.eval.text
    assert facts["commands"][0].startswith("python ")
    assert facts["output"] == str(tmp_path / "run/eval/step-00000000")
    model = open_random_model(config, torch.device("cpu"), Grid())
    assert facts["parameters"] == sum(p.numel() for p in model.network.parameters())
    # A run that cannot be written to keeps no other output from being complete.
    events = Path(config.run.dir) / "tensorboard"
    events.rename(events.with_name("before"))
    events.write_text("not a directory")
    assert evaluate_on_ranks(config, alone, None, None, False, tmp_path / "mine") == 0
    assert list((tmp_path / "mine/tensorboard").glob("events.*"))
    assert title([Report(name="/x/run", trained_length=1)]) == "Evaluation of /x/run"
