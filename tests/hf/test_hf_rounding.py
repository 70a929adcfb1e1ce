"""Export as bf16 after short training from bf16 weights: what rounding takes away, and keeps."""

import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch

from tensorlm.checkpoint import Checkpoint, load_weights, select_checkpoint
from tensorlm.config import load_config
from tensorlm.hf.export_folder import export_checkpoint
from tensorlm.hf.import_folder import import_weights
from tensorlm.hf.rounding import imported_start, round_part, share_put_back
from tensorlm.hf.streamed_loss import sample_document, streamed_loss
from tensorlm.model import Llama
from tensorlm.runtime.errors import UserError
from tests.support.hf_models import folder_weights, launcher_here, random_checkpoint, tiny_llama
from tests.support.launching import TrainRanks

BF16 = torch.bfloat16


def test_stochastic_rounding_is_right_in_the_mean_wherever_parameters_are_cut() -> None:
    exact = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    whole = round_part(exact, BF16, "stochastic", "a", 0)
    cuts = [0, 1, 70_001, 199_999, 200_000]
    parts = [
        round_part(exact[a:b], BF16, "stochastic", "a", a) for a, b in itertools.pairwise(cuts)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(round_part(exact, BF16, "stochastic", "b", 0), whole)
    below, above = exact.view(torch.int32) & -65536, (exact.view(torch.int32) | 65535) + 1
    bits = whole.float().view(torch.int32)
    assert ((bits == below) | (bits == above) | (whole.float() == exact)).all()
    units = (above.view(torch.float32) - below.view(torch.float32)).abs()
    error = ((whole.float() - exact) / units).mean()
    assert abs(error) < 4 * 0.5 / len(exact) ** 0.5
    # A thousandth of a unit above what bf16 can hold: once in a thousand times it goes up.
    moved = torch.ones(400_000) * (1 + 2**-7 / 1000)
    went_up = (round_part(moved, BF16, "stochastic", "a", 0) != 1).double().mean()
    assert 0.0008 < went_up < 0.0012
    held = exact.bfloat16().float()
    assert torch.equal(round_part(held, BF16, "stochastic", "a", 0).float(), held)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_checkpoint_that_is_not_finite_is_not_exported(
    tmp_path: Path, config: Path, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, settings, _ = random_checkpoint(config)
    read = Checkpoint.read

    def spoilt(self: Checkpoint, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        part = read(self, name, key, start, stop)
        if name == "layers.1.mlp.up_proj.weight":
            part[-1] = float(value)
        return part

    monkeypatch.setattr(Checkpoint, "read", spoilt)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight: must be finite"):
        export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", None)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("shape", ["model.fold=[4,8]", "model.tie_embeddings=true"])
def test_streamed_loss_is_that_of_the_whole_model(config: Path, data: Path, shape: str) -> None:
    checkpoint, settings, model = random_checkpoint(config, shape)
    tokens, place = sample_document(data, checkpoint)
    assert place == str(data / "valid")
    with torch.no_grad():
        wanted = model(tokens[:, :-1], None, tokens[:, 1:]) / (tokens.shape[1] - 1)
        assert streamed_loss(checkpoint, settings.model, tokens) == pytest.approx(float(wanted))
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        wanted = model(tokens[:, :-1], None, tokens[:, 1:]) / (tokens.shape[1] - 1)
    found = streamed_loss(checkpoint, settings.model, tokens, lambda _, w: w.bfloat16().float())
    assert found == pytest.approx(float(wanted))


def test_short_training_survives_the_default_export(
    tmp_path: Path,
    config: Path,
    data: Path,
    train_ranks: TrainRanks,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, settings = tmp_path / "llama", load_config(config)
    tiny_llama().bfloat16().save_pretrained(folder)
    import_weights(folder, settings)
    train_ranks("train.stop_at=3", "optim.lr=1e-4", "optim.warmup_steps=0", ranks=1)
    trained = select_checkpoint(tmp_path / "run", 3)
    start = imported_start(trained)
    assert start is not None
    pairs = [(trained.read_parameter(n), start.read_parameter(n)) for n in trained.shapes]
    moved = sum(int((a != b).sum()) for a, b in pairs)
    lost = sum(int(((a != b) & (a.bfloat16() == b.bfloat16())).sum()) for a, b in pairs)
    assert share_put_back(trained, start) == lost / moved > 0.5

    tokens, place = sample_document(data, trained)

    def exported_loss(*options: str) -> tuple[float, str]:
        """Of the exported folder's weights in our model; and what export printed."""
        output = tmp_path / f"hf{len(list(tmp_path.iterdir()))}"
        capsys.readouterr()
        export: list[str | Path] = ["export", "--config", config, "--output", output, *options]
        assert launcher_here("convert.py", *export) == 0
        model = Llama(settings.model)
        weights = {n.removeprefix("model."): w for n, w in folder_weights(output).items()}
        model.load_state_dict({name: weight.float() for name, weight in weights.items()})
        with torch.no_grad():
            loss = model(tokens[:, :-1], None, tokens[:, 1:]) / (tokens.shape[1] - 1)
        return float(loss), capsys.readouterr().out

    model = Llama(settings.model)
    load_weights(trained, model)
    with torch.no_grad():
        exact = float(model(tokens[:, :-1], None, tokens[:, 1:]) / (tokens.shape[1] - 1))
    stochastic, said = exported_loss()
    nearest, said_nearest = exported_loss("--rounding", "nearest")
    assert abs(stochastic - exact) < abs(nearest - exact) / 2  # a mean over few weights
    share = re.escape(f"{lost / moved:.1%}".replace("%", " %"))
    puts = rf"rounding to nearest resets {share} of the weights changed by training"
    assert re.search(rf"^rounding: stochastic; {puts} .*--dtype fp32", said, re.MULTILINE)
    assert re.search(rf"^rounding: nearest \(as requested\); {puts}", said_nearest, re.MULTILINE)
    losses = f"loss on {tokens.shape[1] - 1} tokens of {place}: checkpoint {exact:.4f}, "
    assert f"{losses}export {stochastic:.4f}, rounding to nearest {nearest:.4f}\n" in said
    assert f"{losses}export {nearest:.4f}\n" in said_nearest
    fp32, said = exported_loss("--dtype", "fp32")
    assert fp32 == pytest.approx(exact, rel=1e-6)
    assert "rounding" not in said


def test_export_without_checkpoint_0_or_data_says_what_is_not_known(
    tmp_path: Path, config: Path, train_ranks: TrainRanks, capsys: pytest.CaptureFixture[str]
) -> None:

    tiny_llama().bfloat16().save_pretrained(tmp_path / "llama")
    import_weights(tmp_path / "llama", load_config(config))
    train_ranks("train.stop_at=1", ranks=1)
    shutil.rmtree(tmp_path / "run/step-00000000")
    export = ("export", "--config", config, "--output", tmp_path / "hf", "data.path=nowhere")
    tokenizer = ("--tokenizer", load_config(config).data.path + "/tokenizer")
    assert launcher_here("convert.py", *export, *tokenizer) == 0
    said = capsys.readouterr().out
    assert "rounding: nearest; its effect is not known, " in said
    assert "note: the loss of the exported weights was not measured (nowhere/train" in said


def test_imported_weights_are_exported_as_they_came(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path / "llama")
    import_weights(tmp_path / "llama", load_config(config, ["model.fold=[]"]))
    export = ("export", "--config", config, "--output", tmp_path / "hf", "model.fold=[]")
    assert launcher_here("convert.py", *export, "--rounding", "stochastic") == 0
    found, wanted = (folder_weights(tmp_path / name) for name in ("hf", "llama"))
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert "rounding" not in capsys.readouterr().out
