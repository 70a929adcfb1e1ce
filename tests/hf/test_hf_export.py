"""Export: a folder that plain `transformers` loads where this project is absent."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from fold_parallel import Grid
from tensorlm.checkpoint import (
    STATE,
    ParameterSlice,
    Saver,
    open_checkpoint,
)
from tensorlm.config import CheckpointConfig, load_config
from tensorlm.data.tokenizer.tokenizers import copy_tokenizer, load_tokenizer
from tensorlm.evaluation.model import open_checkpoint_model
from tensorlm.hf.export_folder import export_checkpoint
from tensorlm.hf.hub import create_repository
from tensorlm.hf.load_folder import load_folder
from tensorlm.model import Llama
from tensorlm.runtime import disk
from tensorlm.runtime.disk import Disk
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.lock import locked
from tests.support.distributed import run_distributed
from tests.support.hf_models import (
    assert_same_bytes,
    folder_weights,
    launcher_here,
    random_checkpoint,
    relative_error,
)
from tests.support.launching import ROOT
from tests.support.stand_in_hub import StandInHub


def save_cut_anyhow(run_dir: Path, weights: Path) -> None:
    """Each rank saves every parameter's elements between two arbitrary cuts."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    slices = []
    for name, tensor in torch.load(weights).items():
        cuts = torch.randint(tensor.numel() + 1, (world_size - 1,), generator=seeded(name))
        start, stop = [0, *sorted(cuts.tolist()), tensor.numel()][rank : rank + 2]
        state = dict.fromkeys(STATE, tensor.flatten()[start:stop].clone())
        slices.append(ParameterSlice(name, tuple(tensor.shape), start, stop, state))
    state = {"step": 5, "rows": 10, "tokens": 1280}
    info = {"state": state, "adam_step": 5, "config": {}}
    Saver(run_dir, CheckpointConfig()).save(5, slices, info)


def seeded(text: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(text.encode()))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_slices_of_any_ranks_become_the_same_bytes_in_any_number_of_files(
    tmp_path: Path, config: Path, dtype: str
) -> None:
    _, settings, model = random_checkpoint(config, "model.fold=[4,8]")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.save(parameters, tmp_path / "weights.pt")
    run_distributed(save_cut_anyhow, 3, tmp_path / "cut", tmp_path / "weights.pt")
    checkpoint = open_checkpoint(tmp_path / "cut/step-00000005")
    target = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    wanted = {
        n if n.startswith("lm_head") else f"model.{n}": p.to(target) for n, p in parameters.items()
    }
    for shard_bytes in (5 * 10**9, 20_000):
        folder = tmp_path / f"hf-{shard_bytes}"
        export_checkpoint(checkpoint, settings, folder, dtype, None, shard_bytes=shard_bytes)
        assert_same_bytes(folder_weights(folder), wanted)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in wanted.values())
    assert index["weight_map"].keys() == wanted.keys()
    for path in folder.glob("model-*.safetensors"):
        names = [n for n, file in index["weight_map"].items() if file == path.name]
        assert len(names) == 1 or sum(wanted[n].nbytes for n in names) <= 20_000
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert loaded.dtype == target
    assert_same_bytes({n: p.detach() for n, p in loaded.named_parameters()}, wanted)


def test_folder_uses_our_kernels_where_they_are_installed(tmp_path: Path, config: Path) -> None:
    shape = ("model.tie_embeddings=true", "model.head_dim=16")  # 16 is not 32 / 4
    checkpoint, settings, ours = random_checkpoint(config, "model.fold=[4,8]", *shape)
    export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    module = sys.modules[type(model).__module__]
    assert module.__name__.startswith("transformers_modules.")
    assert module.hop.__module__ == "tensor_attention.api"
    tokens = torch.randint(512, (2, 130))
    with torch.no_grad():
        assert relative_error(model(tokens).logits, ours(tokens)) < 1e-5
        decoder = AutoModel.from_pretrained(tmp_path / "hf", trust_remote_code=True)
        wanted = model.model(tokens).last_hidden_state
        assert torch.equal(decoder(tokens).last_hidden_state, wanted)


def test_plain_llama_reads_the_weights_by_their_names(tmp_path: Path, config: Path) -> None:
    checkpoint, settings, ours = random_checkpoint(config, "model.fold=[8]")
    export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", None)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.randint(512, (3, 40))
    with torch.no_grad():
        inside, beyond = plain(tokens[:, :8]).logits, plain(tokens).logits
        assert relative_error(inside, ours(tokens[:, :8])) < 1e-5  # within the first axis: equal
        assert relative_error(beyond, ours(tokens)) > 1e-3
        full = Llama(load_config(config, ["model.fold=[]"]).model)
        full.load_state_dict(
            {name: p for name, p in ours.state_dict().items() if not name.endswith("hop_bias")}
        )
        assert relative_error(beyond, full(tokens)) < 1e-5


@pytest.mark.parametrize("carries", ["that tokenizer", "another", "none"])
def test_ids_of_an_imported_folder_hold_for_its_own_tokenizer_only(
    tmp_path: Path, config: Path, data: Path, carries: str
) -> None:
    checkpoint, settings, _ = random_checkpoint(config)
    imported, tokenizer = tmp_path / "imported", data / "tokenizer"
    imported.mkdir()
    ids = {"bos_token_id": 5, "eos_token_id": [2, 7], "pad_token_id": 9}
    (imported / "generation_config.json").write_text(json.dumps(ids | {"top_k": 50}))
    if carries == "that tokenizer":
        copy_tokenizer(tokenizer, imported)
    elif carries == "another":
        load_tokenizer(tokenizer).save_pretrained(imported)  # other files
    folder = tmp_path / "hf"
    export_checkpoint(checkpoint, settings, folder, "bf16", tokenizer, imported=imported)
    own = {"bos_token_id": 1, "eos_token_id": 2}
    wanted = ids if carries == "that tokenizer" else own
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == wanted | {"top_k": 50}
    fields = json.loads((folder / "config.json").read_text())
    assert {key: fields[key] for key in ids if key in fields} == wanted


def test_export_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, config: Path, data: Path
) -> None:
    checkpoint, settings, _ = random_checkpoint(config)
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"must contain tokenizer\.json"):
        export_checkpoint(checkpoint, settings, output, "bf16", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export_checkpoint(checkpoint, settings, tmp_path / "file/out", "bf16", None)
    imported = tmp_path / "run/imported"
    imported.mkdir()
    (imported / "generation_config.json").write_text("[1]")
    with pytest.raises(
        UserError, match=r"generation_config\.json: must be a valid generation config"
    ):
        export_checkpoint(checkpoint, settings, output, "bf16", None, imported=imported)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "tiny.toml", "file"}
    export_checkpoint(checkpoint, settings, output, "bf16", None)
    with pytest.raises(UserError, match="must be empty"):
        export_checkpoint(checkpoint, settings, output, "bf16", None)
    assert (output / "model.safetensors").exists()


@pytest.mark.parametrize("leads_to", ["an empty folder", "nothing yet", "a link"])
def test_output_may_be_a_link(tmp_path: Path, config: Path, leads_to: str) -> None:
    random_checkpoint(config)
    output, real = tmp_path / "link", tmp_path / "elsewhere/real"
    real.parent.mkdir()
    if leads_to == "an empty folder":
        real.mkdir()
    output.symlink_to("second" if leads_to == "a link" else real)
    (tmp_path / "second").symlink_to(real)
    export = ("export", "--config", config, "--output", output)
    assert launcher_here("convert.py", *export) == 0
    assert output.is_symlink()
    assert (real / "model.safetensors").exists()
    assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_finished_export_is_kept_where_its_name_cannot_be_taken(
    tmp_path: Path, config: Path
) -> None:
    checkpoint, settings, _ = random_checkpoint(config)
    output = tmp_path / "hf"
    output.mkdir()

    class TakenAtLast(Disk):
        def rename(self, old: Path, new: Path) -> None:
            (output / "file").touch()  # while the export was at work
            super().rename(old, new)

    usual = disk.use(TakenAtLast())
    try:
        with pytest.raises(UserError, match=r"hf: cannot be replaced \(.*finished export is (.*):"):
            export_checkpoint(checkpoint, settings, output, "bf16", None)
    finally:
        disk.use(usual)
    load_folder(tmp_path / ".tmp-hf")


def test_second_export_to_one_output_is_refused(tmp_path: Path, config: Path) -> None:
    checkpoint, settings, _ = random_checkpoint(config)
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    with locked(tmp_path / ".lock-hf", "the first export"):
        for output in (tmp_path / "hf", tmp_path / "link", tmp_path / "run/../hf"):
            with pytest.raises(UserError, match=rf"--output: {output} is in use by pid \d+ on "):
                export_checkpoint(checkpoint, settings, output, "bf16", None)
    export_checkpoint(checkpoint, settings, tmp_path / "hf", "bf16", None)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "tiny.toml", "link", "hf"}


def test_another_model_than_the_checkpoints_is_refused(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, _, _ = random_checkpoint(config, "model.fold=[4,8]")
    export = ("export", "--config", config, "--output", tmp_path / "hf", "model.fold=[16]")
    assert launcher_here("convert.py", *export) == 2
    (line,) = capsys.readouterr().err.splitlines()
    what = "model.fold: must be [4, 8], as in the checkpoint, got [16] (restore it)"
    assert line == f"error: {checkpoint.folder}: {what}"
    assert not (tmp_path / "hf").exists()
    other = load_config(config, ["model.fold=[16]"])
    with pytest.raises(UserError, match=re.escape(what)):
        open_checkpoint_model(other, None, torch.device("cpu"), Grid())


def test_a_step_without_a_checkpoint_is_refused_with_those_that_there_are(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ("export", "--config", config, "--output", tmp_path / "hf", "--checkpoint", "4")
    what = f"error: {tmp_path / 'run'}: no checkpoint of step 4"
    assert launcher_here("convert.py", *export) == 2
    assert capsys.readouterr().err == f"{what} (train first, or set run.dir)\n"
    random_checkpoint(config)
    for step in range(3, 14, 2):
        (tmp_path / f"run/step-{step:08d}").mkdir()
    assert launcher_here("convert.py", *export) == 2
    assert capsys.readouterr().err == f"{what} (choose one of 13, 11, 9, 7, 5, 3, 0)\n"
    for step in (15, 17):
        (tmp_path / f"run/step-{step:08d}").mkdir()
    assert launcher_here("convert.py", *export) == 2
    assert capsys.readouterr().err == f"{what} (choose one of 17, 15, 13, 11, 9, 7, 5, 3, ...)\n"


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_an_output_that_is_taken_is_refused_before_the_checkpoint_is_read(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], taken: str
) -> None:
    output = tmp_path / "hf"
    if taken == "folder":
        output.mkdir()
    (output / "model.safetensors" if taken == "folder" else output).write_text("mine")
    # There is no checkpoint either.
    assert launcher_here("convert.py", "export", "--config", config, "--output", output) == 2
    state = "must be empty" if taken == "folder" else "must be a folder"
    assert capsys.readouterr().err == f"error: {output}: {state} (choose another --output)\n"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StandInHub]:
    server = StandInHub(tmp_path / "home")
    yield server
    server.close()


def export_arguments(config: Path, output: Path) -> list[str]:
    command = ["export", "--config", str(config), "--output", str(output)]
    return [*command, "--push-to-hub", "someone/tiny"]


def test_upload_reaches_the_hub_as_one_commit(
    tmp_path: Path, config: Path, data: Path, hub: StandInHub
) -> None:
    random_checkpoint(config)
    result = subprocess.run(
        [sys.executable, "launcher/convert.py", *export_arguments(config, tmp_path / "hf")],
        cwd=ROOT, env=hub.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert hub.created == {"name": "tiny", "organization": "someone", "visibility": "private"}
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert hub.commit_url in result.stdout


@pytest.mark.parametrize("refused", ["commit", "weights"])
def test_upload_that_fails_leaves_a_whole_folder_and_one_line(
    tmp_path: Path,
    config: Path,
    hub: StandInHub,
    refused: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, _, ours = random_checkpoint(config)
    hub.refuses = refused
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_madeup")
    folder = tmp_path / "hf"
    assert launcher_here("convert.py", *export_arguments(config, folder)) == 2
    *_, line = capsys.readouterr().err.splitlines()  # bars are before it
    what = {
        "commit": "Client error '404 Not Found'",
        "weights": "Error while uploading 'model.safetensors'",
    }[refused]
    assert line.startswith(f"error: --push-to-hub someone/tiny: {what}")
    assert line.endswith(f"({folder} is intact: continue with `hf upload someone/tiny {folder}`)")
    assert len(folder_weights(folder)) == len(list(ours.parameters()))
    assert hub.created
    assert not hub.files


def test_hub_that_refuses_is_one_line_before_any_work(
    tmp_path: Path,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    random_checkpoint(config)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert launcher_here("convert.py", *export_arguments(config, tmp_path / "hf")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: --push-to-hub someone/tiny: .*Connection refused \(.*HF_TOKEN", line)
    assert not (tmp_path / "hf").exists()
    with pytest.raises(UserError, match="--push-to-hub some one/tiny: "):
        create_repository("some one/tiny", public=False)
