"""Settings between a folder and a run: written from it, kept for it, and named where unused."""

import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from tensorlm.checkpoint import Checkpoint, list_steps, select_checkpoint
from tensorlm.config import Config, ModelConfig, load_config
from tensorlm.evaluation.launch import evaluate_on_ranks
from tensorlm.hf.export_folder import export_checkpoint
from tensorlm.hf.import_folder import imported_folder
from tensorlm.hf.llama_config import check_config, model_settings
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.launch_env import LaunchEnv
from tests.hf.test_hf_import import LLAMA3_ROPE
from tests.support.hf_models import launcher_here, random_checkpoint, tiny_llama

# ------------------------------------------------------------------------------- written for a run

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "head size of its own": {"head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 7000.0, "factor": 2.0}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_configuration_that_import_writes_is_one_that_it_takes(
    tmp_path: Path, shape: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "Tiny-Llama"
    tiny_llama(**SHAPES[shape]).save_pretrained(folder)
    written = ("import", "--hf", folder, "--write-config", "own.toml", "model.fold=[16]")
    assert launcher_here("convert.py", *written) == 0
    said = capsys.readouterr().out.splitlines()[-1]  # behind what libraries may print
    assert said.startswith(f"own.toml: a configuration for {folder}; ")
    config = load_config(tmp_path / "own.toml")
    assert config.run.dir == "runs/Tiny-Llama"
    assert config.model.fold == (16,)
    assert not list_steps(Path(config.run.dir))  # nothing is imported yet
    command = shlex.split(said.rpartition("then run: python launcher/convert.py ")[2])
    assert launcher_here("convert.py", *command) == 0
    assert list_steps(Path(config.run.dir)) == [0]
    assert launcher_here("convert.py", *written) == 2
    assert "--write-config: must be a new file, got " in capsys.readouterr().err


def test_numbers_that_a_format_keeps_in_float32_are_equal(tmp_path: Path) -> None:
    tiny_llama(rms_norm_eps=float(np.float32(1e-5))).save_pretrained(tmp_path / "from-gguf")
    tiny_llama(rms_norm_eps=1.1e-5).save_pretrained(tmp_path / "another")
    model = model_settings(tmp_path / "from-gguf") | {"rms_norm_eps": 1e-5}
    check_config(tmp_path / "from-gguf", ModelConfig(**model))
    with pytest.raises(UserError, match=r"rms_norm_eps: must be 1\.1e-05, as in .*, got 1e-05"):
        check_config(tmp_path / "another", ModelConfig(**model))


def test_other_sections_come_from_a_given_configuration(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "llama", tmp_path / "own.toml"
    tiny_llama(num_hidden_layers=3).save_pretrained(folder)
    scaling = 'rope_scaling = {rope_type = "linear", factor = 2.0}\n'
    config.write_text(config.read_text().replace("[model]\n", f"[model]\n{scaling}"))
    before = tomllib.loads(config.read_text())
    write = ("import", "--config", config, "--hf", folder, "--write-config", output)
    assert launcher_here("convert.py", *write, "run.dir=elsewhere", "optim.lr=0.5") == 0
    after = tomllib.loads(output.read_text())
    assert after["model"]["num_layers"] == 3
    assert after["model"]["fold"] == before["model"]["fold"]
    assert "rope_scaling" not in after["model"]
    assert (after["run"]["dir"], after["optim"]["lr"]) == ("elsewhere", 0.5)
    for section in ("data", "train"):
        assert after[section] == before[section]
    output.unlink()
    assert launcher_here("convert.py", *write, "model.num_layers=5") == 2
    assert "model.num_layers: must be " in capsys.readouterr().err
    assert not output.exists()


def test_folded_folder_brings_its_fold(tmp_path: Path, config: Path) -> None:
    checkpoint, settings, _ = random_checkpoint(config, "model.fold=[4,8]", "model.full_every=2")
    export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", None)
    output = tmp_path / "own.toml"
    write = ("import", "--hf", tmp_path / "hf", "--write-config", output)
    assert launcher_here("convert.py", *write) == 0
    model = load_config(output).model
    assert (model.fold, model.full_every) == ((4, 8), 2)


def test_import_needs_a_configuration_or_writes_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher_here("convert.py", "import", "--hf", tmp_path) == 2
    assert capsys.readouterr().err == "error: --config: missing (the TOML file of the run)\n"
    assert launcher_here("convert.py", "export", "--output", tmp_path / "hf") == 2
    assert capsys.readouterr().err == "error: --config: missing (the TOML file of the run)\n"


def test_closing_line_repeats_the_settings_that_were_given(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "llama"
    tiny_llama().save_pretrained(folder)
    settings = [f"run.dir={tmp_path}/with space", "model.fold=[]"]
    arguments = ("--config", str(config), settings[0], "--hf", str(folder), settings[1])
    assert launcher_here("convert.py", "import", *arguments) == 0
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if line.endswith(" starts from them")]
    words = shlex.split(line.rpartition("training with ")[2].removesuffix(" starts from them"))
    assert words == ["--config", str(config), *settings]


# -------------------------------------------------------------------------- kept for the way back


def imported_checkpoint(
    tmp_path: Path, config: Path, *overrides: str
) -> tuple[Checkpoint, Config, Path]:
    folder = tmp_path / "llama"
    model = tiny_llama(max_position_embeddings=8192, eos_token_id=[5, 6], bos_token_id=3)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    arguments: list[str | Path] = ["--config", config, "--hf", folder, "model.fold=[]", *overrides]
    assert launcher_here("convert.py", "import", *arguments) == 0
    carried = imported_folder(tmp_path / "run")
    assert carried is not None
    settings = load_config(config, ["model.fold=[]", *overrides])
    return select_checkpoint(tmp_path / "run", 0), settings, carried


def after_steps(checkpoint: Checkpoint, step: int) -> Checkpoint:
    return Checkpoint(checkpoint.folder, checkpoint.manifest | {"step": step})


@pytest.mark.parametrize(
    ("step", "seq_len", "wanted"),
    [(0, 64, 8192), (0, 16384, 8192), (3, 64, 8192), (2, 16384, 8192), (3, 16384, 16384)],
)
def test_context_length_is_the_imported_one_unless_training_extended_it(
    tmp_path: Path, config: Path, step: int, seq_len: int, wanted: int
) -> None:
    phases = "train.earlier_stages=[{steps=2,seq_len=64,rows_per_step=4}]"
    checkpoint, settings, carried = imported_checkpoint(
        tmp_path, config, phases, f"data.seq_len={seq_len}"
    )
    checkpoint = after_steps(checkpoint, step)
    export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", None, imported=carried)
    assert AutoConfig.from_pretrained(tmp_path / "hf").max_position_embeddings == wanted


def test_context_length_of_random_weights_is_that_of_the_rows(tmp_path: Path, config: Path) -> None:
    checkpoint, settings, _ = random_checkpoint(config, "model.fold=[]")
    export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", None)
    found = AutoConfig.from_pretrained(tmp_path / "hf").max_position_embeddings
    assert found == settings.data.seq_len


def test_token_ids_that_stand_in_the_imported_config_alone_are_kept(
    tmp_path: Path, config: Path
) -> None:
    checkpoint, settings, carried = imported_checkpoint(tmp_path, config)
    export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", None, imported=carried)
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / "hf" / name).read_text())
        assert (fields["bos_token_id"], fields["eos_token_id"]) == (3, [5, 6]), name


# ------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("differs", [True, False])
def test_evaluated_folder_names_the_settings_that_it_does_not_use(
    tmp_path: Path,
    config: Path,
    data: Path,
    differs: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ["eval.lengths=[32]", "eval.max_tokens=64", 'eval.tasks=["ppl"]', "model.fold=[]"]
    checkpoint, exported, _ = random_checkpoint(config, *settings)
    folder = tmp_path / "hf"
    export_checkpoint(checkpoint, exported, folder, "fp32", data / "tokenizer")
    files = sorted(path.name for path in folder.rglob("*"))
    changes = ["model.fold=[16]", "model.rope_theta=5.0"] if differs else []
    capsys.readouterr()
    alone = LaunchEnv(0, 1, 0, 1, "127.0.0.1", 1)
    evaluate_on_ranks(load_config(config, [*settings, *changes]), alone, None, folder, False, None)
    said = capsys.readouterr().out
    note = f"note: --hf: the model of {folder} is used; these settings have no effect: "
    wanted = f"{note}rope_theta = 5.0 ({folder} has 10000.0), fold = [16] ({folder} has [])\n"
    assert (wanted in said) == differs
    assert ("note: --hf" in said) == differs
    assert (tmp_path / "run/eval/hf-hf/report.json").exists()
    assert sorted(path.name for path in folder.rglob("*")) == files
