"""The table of an adaptation, and the configurations that it compares."""

from pathlib import Path

import pytest
import torch

from tensorlm.benchmarks.adaptation import (
    attention_share,
    explain_table,
    format_table,
    read_variants,
)
from tensorlm.config import Config, load_config
from tensorlm.evaluation.results import Bucket, Cell, LengthResult, Mean, Report
from tensorlm.runtime.errors import UserError
from tests.support.launching import ROOT

CONFIGS = sorted((ROOT / "configs" / "adapt").glob("*.toml"))


def test_variants_differ_in_attention_alone() -> None:
    assert len(CONFIGS) >= 7
    first, *others = (load_config(file) for file in CONFIGS)
    kinds = set()
    for config, file in zip((first, *others), CONFIGS, strict=True):
        assert Path(config.run.dir).name == file.stem
        settings = config.model_dump(exclude={"run": {"dir"}, "model": True})
        expected = first.model_dump(exclude={"run": {"dir"}, "model": True})
        if config.model.route and config.model.route.choice == "random":
            expected["eval"]["tasks"] = ("ppl",)  # a random choice cannot generate
        assert settings == expected
        attention = {"fold", "window", "route", "full_every", "route_every", "layers"}
        shape = config.model.model_dump(exclude=attention)
        assert shape == first.model.model_dump(exclude=attention)
        kinds |= set(config.model.layer_kinds)
    assert kinds == {"window", "strided", "routed", "full"}


def report(folder: Path, losses: dict[int, float], passkey: list[Cell]) -> None:
    results = [
        LengthResult(
            length=length, loss=loss, perplexity=1.0, low=None, high=None,
            sliding_perplexity=None, num_tokens=1, num_documents=1,
            buckets=[
                Bucket(start=0, stop=length // 2, loss=Mean(mean=9.0)),
                Bucket(start=length // 2, stop=length, loss=Mean(mean=loss)),
            ],
        )
        for length, loss in losses.items()
    ]  # fmt: skip
    Report(name="r", trained_length=64, perplexity=results, passkey=passkey).write(folder)


def variant(folder: Path, name: str, model: str) -> Path:
    text = next(file for file in CONFIGS if file.stem == "window").read_text()
    run = folder / name
    run.mkdir()
    (run / "config.toml").write_text(text.replace("window = 512\n", model))
    return run


def test_table(tmp_path: Path) -> None:
    route = "window = 32\n[model.route]\nblock = 8\ntop_k = 1\nstretch = 1\n"
    models = {"full": "", "window": "window = 32\n", "mine": route}
    runs = [variant(tmp_path, name, model) for name, model in models.items()]
    with pytest.raises(UserError, match="a run must be evaluated first"):
        read_variants(runs)
    for name, loss in {"full": 1.0, "window": 2.0, "mine": 1.25}.items():
        report(tmp_path / name / "code", {64: loss, 256: loss + 1}, [])
    cells = [
        Cell(length=64, depth=0.0, accuracy=1.0, num_samples=1),
        Cell(length=64, depth=1.0, accuracy=0.5, num_samples=4),
    ]
    report(tmp_path / "mine" / "needles", {}, cells)
    head, _, full, window, mine = format_table(read_variants(runs)).splitlines()
    assert head.split(" | ")[3] == "loss, code, 32-64 / 128-256"
    assert head.split(" | ")[4] == "gap closed, code"
    assert full.split(" | ")[1:5] == ["32 / 128", "1", "1.0000 / 2.0000", "100 %"]
    assert window.split(" | ")[3:] == ["2.0000 / 3.0000", "0 %", "- / - |"]
    assert mine.split(" | ")[3:] == ["1.2500 / 2.2500", "75 %", "0.60 / - |"]
    lines = explain_table(read_variants(runs)).splitlines()
    assert "mine: routed (window 32, 1 + 1 blocks of 8, stretch 1)" in lines
    names = {line.split(" ")[0].rstrip(":") for line in lines[3:]}
    assert names == {name.split(" ")[0].rstrip(",") for name in head[2:].split(" | ")[1:]}
    assert any("at 64 tokens" in line for line in lines if line.startswith("gap closed"))


def test_seeds_of_a_variant_share_a_row(tmp_path: Path) -> None:
    losses = {
        "full": 1.0, "window": 2.0, "full-1": 1.1, "window-1": 1.9,
        "window_512": 1.5, "window_512-1": 1.2, "window_512-2": 1.0,
    }  # fmt: skip
    runs = []
    for name, loss in losses.items():
        runs.append(variant(tmp_path, name, "window = 32\n"))
        if name[-2] == "-":
            settings = runs[-1] / "config.toml"
            settings.write_text(settings.read_text().replace("seed = 0", f"seed = {name[-1]}"))
        report(runs[-1] / "code", {64: loss}, [])
    _, _, full, window, mine = format_table(read_variants(runs)).splitlines()
    assert full.split(" | ")[3:] == ["1.0500 ± 0.0707", "100 ± 0 % |"]
    assert window.split(" | ")[3:] == ["1.9500 ± 0.0707", "0 ± 0 % |"]
    # Seed 0: (2 - 1.5) / (2 - 1) = 50 %; seed 1: (1.9 - 1.2) / (1.9 - 1.1) = 87.5 %; seed 2 has no
    # full attention to compare with, but counts in the mean loss.
    assert mine.split(" | ")[0] == "| window_512"
    assert mine.split(" | ")[3:] == ["1.2333 ± 0.2517", "69 ± 27 % |"]


def test_share_of_full_attention() -> None:
    """128k tokens of Llama-8B: counted pair by pair, in another way than the product does."""
    config = load_config(next(file for file in CONFIGS if file.stem == "routed"))
    depth = torch.arange(131_072, dtype=torch.float64)
    pairs = (depth + 1).clamp(max=512 + 17 * 64).sum()
    scores = 4 * ((depth - 512).clamp(min=0) / 64).floor().sum()  # 4 parts of 16 a block
    own = 4 * 32 * 128 * pairs + 2 * 8 * 128 * scores
    assert attention_share(config) == pytest.approx(float(own / (4 * 32 * 128 * (depth + 1).sum())))
    plain: Config = load_config(next(file for file in CONFIGS if file.stem == "full"))
    assert attention_share(plain) == 1
