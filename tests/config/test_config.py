"""Configurations: every shipped one is good, and every mistake is one helpful line."""

import tomllib
from pathlib import Path

import pytest
import torch

from tensorlm.checkpoint import model_differences
from tensorlm.config import Config, config_toml, load_config, parse_config
from tensorlm.config.settings_table import settings_table
from tensorlm.model import Llama
from tensorlm.runtime.errors import UserError
from tests.support.forked import run_forked

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.toml"))
NUM_PARAMETERS = {
    "demo.toml": 1_311_888,
    # Llama-3-8B has 8,030,261,248; 32 layers x 32 heads x 1 hop bias come on top.
    "llama8b_32k_fold.toml": 8_030_261_248 + 32 * 32,
    "llama8b_32k_1gpu.toml": 8_030_261_248,
    "llama8b_128k.toml": 8_030_261_248,
    "llama8b_32k.toml": 8_030_261_248,
    "llama8b_hybrid_32k.toml": 8_030_261_248 + 28 * 32,  # full layers have no hop bias
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configuration_builds_on_the_meta_device(path: Path) -> None:
    config = load_config(path)
    with torch.device("meta"):
        model = Llama(config.model)
    assert sum(p.numel() for p in model.parameters()) == NUM_PARAMETERS[path.name]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_resolved_configuration_reads_back_equal(tmp_path: Path, path: Path) -> None:
    config = load_config(path, ["run.seed=7"])
    (tmp_path / "config.toml").write_text(config_toml(config))
    assert load_config(tmp_path / "config.toml") == config
    assert config.run.seed == 7


def problems(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(ROOT / "configs/demo.toml", overrides)
    return list(caught.value.problems)


def test_unknown_key_names_the_nearest_valid_one() -> None:
    lines = problems("optim.weigt_decay=0.1", "model.hiden_size=3")
    assert any("optim.weigt_decay" in x and "did you mean weight_decay?" in x for x in lines)
    assert any("model.hiden_size" in x and "did you mean hidden_size?" in x for x in lines)
    assert all("unknown key" in x for x in lines)


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("optim.lr='1e-4'", "optim.lr"),
        ("optim.lr=nan", "optim.lr"),
        ("model.num_heads=3", "num_heads"),
        ("model.fold=[1]", "fold"),
        ("zero.stage=4", "zero.stage"),
        ("train.steps=0", "train.steps"),
        ("parallel.sp=3", "parallel.sp"),
        ("optim.warmup_steps=1000", "warmup_steps"),
        ("optim.betas=[1.5, 0.9]", "optim.betas"),
        ("optim.schedule=wsd", "optim.decay_steps"),
        ("run.seed=99999999999999999999", "run.seed"),
        ("train.profile=[5, 2]", "train.profile"),
        ("train.profile=[-1, 2]", "train.profile"),
        ("train.activation_offload=true", "train.activation_offload: needs train.recompute"),
        (
            "train.recompute_interval=2",
            "train.recompute_interval: must be 1 unless train.recompute",
        ),
        ("train.recompute_interval=0", "train.recompute_interval"),
        ("train.mlp_chunk=-1", "train.mlp_chunk"),
        ("train.fused_layers=apex", "train.fused_layers"),
        ("nonsense", "nonsense"),
        ("model=3", "model"),
    ],
)
def test_wrong_value_is_named_in_one_line(override: str, word: str) -> None:
    lines = problems(override)
    assert any(word in line for line in lines)
    assert all("\n" not in line for line in lines)


def test_a_schedule_longer_than_the_run_is_reported_with_both_lengths() -> None:
    lines = problems("train.steps=3", "optim.warmup_steps=2", "optim.decay_steps=4")
    rule = "optim: warmup_steps + decay_steps must be at most train.steps = 3, got 2 + 4 "
    assert any(rule + "(lower them or train longer)" in line for line in lines)


def test_contradictions_are_reported_together() -> None:
    lines = problems("zero.stage=0", "train.dtype=bf16", "optim.min_lr=1.0")
    assert len(lines) == 2


def phase(**changes: int) -> str:
    values = {"steps": 10, "seq_len": 1024, "rows_per_step": 8, **changes}
    return "{" + ", ".join(f"{key} = {value}" for key, value in values.items()) + "}"


def test_phases_follow_one_another_and_the_last_takes_the_rest() -> None:
    overrides = [f"train.earlier_stages=[{phase()}, {phase(steps=5, seq_len=2048)}]"]
    config = load_config(ROOT / "configs/demo.toml", overrides)
    steps = config.train.steps
    assert [s.steps for s in config.phases] == [10, 5, steps - 15]
    lengths = [config.phase_at(step).seq_len for step in range(steps)]
    assert lengths == [1024] * 10 + [2048] * 5 + [4096] * (steps - 15)
    assert config.phases[-1].num_rows == (steps - 15) * config.train.rows_per_step


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"train.earlier_stages=[{phase(step=1)}]", "earlier_stages.0.step: unknown key"),
        (f"train.earlier_stages=[{phase(step=1)}]", "did you mean steps?"),
        (
            f"train.earlier_stages=[{phase(steps=9999)}]",
            "train.earlier_stages: must have fewer steps",
        ),
        (f"train.earlier_stages=[{phase(seq_len=1)}]", "earlier_stages.0.seq_len"),
        ("data.sources=[{path='a', wieght=2}]", "did you mean weight?"),
        ("data.sources=[{path='a', weight=0}]", "data.sources.0.weight"),
        ("data.sources=[{weight=1}]", "data.sources.0.path: missing"),
    ],
)
def test_wrong_phase_or_source_is_named_in_one_line(override: str, words: str) -> None:
    assert any(words in line for line in problems(override))


def test_every_phase_is_checked_for_sharing() -> None:
    lines = problems(f"train.earlier_stages=[{phase(seq_len=768)}]", "parallel.sp=2")
    assert any("train.earlier_stages.0: sp = 2 cannot share rows" in line for line in lines)
    override = f"train.earlier_stages=[{phase(rows_per_step=3)}]"
    config = load_config(ROOT / "configs/demo.toml", [override])
    with pytest.raises(UserError, match=r"train\.earlier_stages\.0\.rows_per_step: must be"):
        config.check_world(2)


def test_the_key_that_recompute_has_replaced_is_read() -> None:
    tree = tomllib.loads((ROOT / "configs/demo.toml").read_text())
    for recomputes, recompute in ((True, "block"), (False, "none")):
        tree["train"]["activation_checkpointing"] = recomputes  # as in old checkpoints
        train = parse_config(tree, "manifest").train
        assert train.recompute == recompute
        assert "activation_checkpointing" not in train.model_dump()
    with pytest.raises(UserError, match="must not be set beside recompute"):
        load_config(ROOT / "configs/llama8b_32k.toml", ["train.activation_checkpointing=true"])


def test_lengths_that_training_cannot_evaluate_are_refused() -> None:
    settings = ("parallel.sp=2", "eval.lengths=[768,1536]", "eval.every=2")
    (line,) = problems(*settings)
    assert "eval.lengths: sp = 2 cannot share rows with seq_len = 768, fold = [256]" in line
    # Beside training, one device may take windows that ranks could not share.
    load_config(ROOT / "configs/demo.toml", [*settings, "eval.every=0"])
    load_config(ROOT / "configs/demo.toml", [*settings, 'eval.tasks=["niah"]'])


def test_rows_that_ranks_cannot_share_are_refused() -> None:
    config: Config = load_config(ROOT / "configs/demo.toml")
    config.check_world(2)
    with pytest.raises(UserError, match="rows_per_step"):
        config.check_world(3)


def test_every_setting_that_makes_another_model_is_told_and_no_other() -> None:
    path = ROOT / "configs/demo.toml"
    trained = load_config(path, ["model.fold=[16]"]).model_dump(mode="json", exclude_none=True)
    scaling = 'model.rope_scaling={rope_type="linear", factor=2.0}'
    changes = ["model.fold=[8]", "model.full_every=2", "model.rope_theta=5.0", scaling]
    lines = model_differences(trained, load_config(path, [*changes, "model.tie_embeddings=true"]))
    keys = [line.partition(":")[0] for line in lines]
    settings = ("rope_theta", "rope_scaling", "tie_embeddings", "fold", "full_every")
    assert keys == [f"model.{name}" for name in settings]
    assert lines[3] == "model.fold: must be [16], as in the checkpoint, got [8] (restore it)"
    head_size = load_config(path).model.head_size
    same = ["model.fold=[16]", "model.init_std=0.5", "model.hop_bias_init=1.0", "train.steps=999"]
    same.append(f"model.head_dim={head_size}")
    assert not model_differences(trained, load_config(path, same))
    trained["model"]["fold"] = []
    assert not model_differences(
        trained, load_config(path, ["model.fold=[]", "model.full_every=2"])
    )


def test_launcher_prints_error_lines_and_exits_2() -> None:
    settings = ["--config", "configs/demo.toml", "model.hiden_size=3", "optim.lr=-1"]
    result = run_forked("train.py", *settings)
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: configs/demo.toml: ") for line in lines)


def test_the_page_of_settings_is_current() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    table = f"\n\n{settings_table().strip()}\n"
    assert page.endswith(table), "python -m tensorlm.config.settings_table"


def test_every_setting_is_described() -> None:
    rows = [line for line in settings_table().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert [row for row in rows if row.endswith("|  |")] == []


HIDDEN: dict[str, tuple[list[str], list[str]]] = {
    "unknown key, contradiction": (
        ["run.sed=1", "optim.min_lr=1.0"], ["run.sed: unknown", "optim.min_lr: must"]
    ),
    "unknown key, ranks": (
        ["train.stepz=4", "train.rows_per_step=3"],
        ["train.stepz: unknown key (did you mean steps?)", "train.rows_per_step: must be"],
    ),
    "unknown section, contradiction, ranks": (
        ["trian.steps=4", "zero.stage=0", "train.dtype=bf16", "train.rows_per_step=3"],
        ["trian: unknown key (did you mean train?)", "zero.stage: must", "rows_per_step: must"],
    ),
    "wrong value, contradiction, ranks": (
        ["train.steps=0", "zero.stage=0", "train.dtype=bf16", "train.rows_per_step=3"],
        ["train.steps: must be above 0, got 0", "zero.stage: must", "rows_per_step: must"],
    ),
    "wrong kind, contradiction": (
        ["eval.near=many", "optim.min_lr=1.0"],
        ['eval.near: must be an integer, got "many"', "optim.min_lr: must"],
    ),
    "wrong list, contradiction": (
        ["optim.betas=[1.5, 0.9]", "optim.min_lr=1.0"], ["optim.betas.0: ", "optim.min_lr: must"]
    ),
    "wrong section, contradiction": (
        ["model.num_heads=3", "optim.min_lr=1.0"],
        ["model: hidden_size must", "model: num_heads must", "optim.min_lr: must"],
    ),
    "not an override, unknown key, contradiction": (
        ["nonsense", "model=3", "run.sed=3", "optim.min_lr=1.0"],
        ["nonsense: must have the form", "model: ", "run.sed: unknown", "optim.min_lr: must"],
    ),
    "phase, source, contradiction": (
        ["train.earlier_stages=[{step=1}]", "data.sources=[{path='a'}, {path='a', wieght=2}]",
         "zero.stage=0", "train.dtype=bf16"],
        ["earlier_stages.0.steps: missing", "0.seq_len: missing", "0.rows_per_step: missing",
         "0.step: unknown", "sources.1.wieght: unknown", "zero.stage: must"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_no_mistake_hides_another(name: str) -> None:
    overrides, wanted = HIDDEN[name]
    with pytest.raises(UserError) as caught:
        load_config(ROOT / "configs/demo.toml", overrides, world_size=2)
    lines = list(caught.value.problems)
    for words in wanted:
        assert sum(words in line for line in lines) == 1, (words, lines)
    assert len(lines) == len(wanted), lines


@pytest.mark.parametrize(
    "override",
    [
        "optim.decay_stepz=10", "optim.decay_steps=many", "optim.decay_steps=-1",
        "optims.decay_steps=10",
    ],
)  # fmt: skip
def test_what_only_follows_from_a_mistake_is_not_reported(override: str) -> None:
    (line,) = problems("optim.schedule=wsd", override)  # which needs decay_steps
    assert override.partition("=")[0].partition(".")[0] in line
    (line,) = problems("model.fold=[1]", "parallel.sp=3")[:1]
    assert "fold" in line


def test_mistakes_in_the_file_are_all_reported(tmp_path: Path) -> None:
    text = (ROOT / "configs/demo.toml").read_text()
    path = tmp_path / "steps.toml"
    path.write_text("\ufeff" + text.replace("[train]", '[train]\nstepz = 3\nfused_layers = "x"'))
    with pytest.raises(UserError) as caught:
        load_config(path, ["optim.min_lr=1.0"])
    assert [line.split(": ")[1] for line in caught.value.problems] == [
        "train.fused_layers", "train.stepz", "optim.min_lr",
    ]  # fmt: skip
    path.write_text("[optim]\nlr = -1.0")
    with pytest.raises(UserError) as caught:
        load_config(path, world_size=2)
    assert sorted(line.split(": ")[1] for line in caught.value.problems) == [
        "data", "model", "optim.lr", "run", "train",
    ]  # fmt: skip
    path.write_text(f"\ufeff{text}")
    assert load_config(path) == load_config(ROOT / "configs/demo.toml")


def test_a_dry_run_reports_what_ranks_cannot_share_beside_an_unknown_key() -> None:
    settings = ["--config", "configs/demo.toml", "train.stepz=4", "train.rows_per_step=3"]
    result = run_forked("train.py", *settings, "--dry-run", "2")
    assert result.returncode == 2
    first, second = result.stderr.splitlines()
    assert first.startswith("error: configs/demo.toml: train.stepz: unknown key")
    assert second.startswith("error: train.rows_per_step: must be a multiple of dp 2")
