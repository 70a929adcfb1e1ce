"""Convert weights between checkpoints and Hugging Face folders.

Export a checkpoint to a new folder:
  python launcher/convert.py export --config C --output DIR [--checkpoint STEP] [--dtype bf16]
Import a folder as checkpoint 0, from which training starts:
  python launcher/convert.py import --config C --hf DIR
Write a configuration that fits a folder:
  python launcher/convert.py import --hf DIR --write-config C
"""

import argparse
import shlex
from pathlib import Path

from tensorlm.config import Config, load_config
from tensorlm.runtime.arguments import Command, Option, Settings, parse_command
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.exit import run_launcher

COMMANDS = {
    "export": Command(
        "write a checkpoint as a Hugging Face folder",
        {
            "--output DIR": Option("new folder to write", required=True),
            "--checkpoint STEP": Option("step of the checkpoint to export (default: the newest)"),
            "--dtype": Option("dtype of the exported weights", "bf16", choices=("bf16", "fp32")),
            "--rounding": Option(
                "how weights are rounded to bf16 (default: stochastic if rounding to nearest would "
                "undo much of the training from imported weights, otherwise nearest)",
                choices=("nearest", "stochastic"),
            ),
            "--tokenizer DIR": Option(
                "folder of the tokenizer to include (default: that of the data set or of the "
                "imported folder)"
            ),
            "--push-to-hub OWNER/NAME": Option(
                "also upload the folder to this repository of the Hugging Face Hub; a new "
                "repository is private"
            ),
            "--public": Option("with --push-to-hub: make a new repository public", default=False),
        },
        Settings("TOML file of the run (required)", required=False),
    ),
    "import": Command(
        "write a Hugging Face Llama folder as checkpoint 0 of a run",
        {
            "--hf DIR": Option("Hugging Face folder with Llama weights", required=True),
            "--write-config FILE": Option(
                "write a configuration to this file instead of importing weights; [model] is taken "
                "from the folder, other sections from --config (default: values to start from)"
            ),
        },
        Settings("TOML file of the run (required, except with --write-config)", required=False),
    ),
}


def main() -> int:
    args = parse_command(__doc__, COMMANDS)
    if args.command == "import":
        _check_folder(args.hf)
        if args.write_config:
            return _write_config(args)
    if not args.config:
        raise UserError("--config: missing (the TOML file of the run)")
    convert = import_ if args.command == "import" else export
    return convert(args, load_config(args.config, args.overrides))


def export(args: argparse.Namespace, config: Config) -> int:
    from tensorlm.checkpoint import config_to_read, select_checkpoint
    from tensorlm.checkpoint.publish import was_imported
    from tensorlm.hf import hub, rounding
    from tensorlm.hf.export_folder import check_new_folder, export_checkpoint
    from tensorlm.hf.export_tokenizer import describe_prompts
    from tensorlm.hf.import_folder import imported_folder
    from tensorlm.hf.imported_tokenizer import describe_another_tokenizer
    from tensorlm.hf.streamed_loss import describe_losses

    check_new_folder(args.output)  # early: verifying a large checkpoint takes minutes
    run_dir = Path(config.run.dir)
    checkpoint = select_checkpoint(run_dir, args.checkpoint)
    trained = config_to_read(checkpoint, config)
    imported = imported_folder(run_dir)
    data_tokenizer = Path(config.data.path) / "tokenizer"
    sha256 = checkpoint.manifest.get("tokenizer_sha256")  # None for imported weights
    tokenizer = _choose_tokenizer(args.tokenizer, data_tokenizer, imported, sha256)
    if args.push_to_hub:  # before the export, since the Hub may refuse
        hub.create_repository(args.push_to_hub, public=args.public)
    rounds = args.dtype == "bf16" and checkpoint.step > 0 and was_imported(run_dir)
    start = rounding.imported_start(checkpoint) if rounds else None
    put_back = rounding.share_put_back(checkpoint, start) if start else None
    how = args.rounding or rounding.choose_rounding(put_back)
    export_checkpoint(
        checkpoint, trained, args.output, args.dtype, tokenizer, imported=imported,
        rounding=how,
    )  # fmt: skip
    print(f"{args.output}: step {checkpoint.step} of {run_dir}, {args.dtype}", flush=True)
    if rounds:
        print(rounding.describe_rounding(put_back, how, is_asked=args.rounding is not None))
        print(describe_losses(checkpoint, trained.model, Path(config.data.path), how))
    if tokenizer is None:
        print("note: no tokenizer was exported (pass --tokenizer DIR to include one)")
    else:
        if note := describe_another_tokenizer(imported, data_tokenizer, config.data.path):
            print(note)
        if prompts := describe_prompts(args.output):
            print(f"note: {prompts}")
    if args.push_to_hub:
        message = f"Step {checkpoint.step} of {run_dir.name}"
        print(hub.upload(args.output, args.push_to_hub, message))
    return 0


def _choose_tokenizer(
    requested: Path | None, data: Path, imported: Path | None, sha256: str | None
) -> Path | None:
    """The tokenizer to export: the requested one, or that of the data or of the imported weights.

    Args:
        requested: folder of --tokenizer.
        data: folder of the data's tokenizer.
        imported: folder kept from the import, if weights were imported.
        sha256: hash of the tokenizer that encoded the training data; None if nothing was trained.

    Raises:
        UserError: the tokenizer was not requested, and its hash differs.
    """
    from tensorlm.data.tokenizer.files import has_tokenizer
    from tensorlm.data.tokenizer.tokenizers import check_tokenizer

    candidates = [data, *([imported] if imported else [])]
    if sha256 is None:
        candidates.reverse()
    tokenizer = requested or next((c for c in candidates if has_tokenizer(c)), None)
    if tokenizer and sha256:
        fix = "as requested" if requested else "choose one with --tokenizer DIR"
        try:
            check_tokenizer(tokenizer, sha256, fix)
        except UserError as error:
            if requested is None:
                raise
            print(f"note: {error}")
    return tokenizer


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"--hf: must be a folder, got {folder} (download the model first)")


def _write_config(args: argparse.Namespace) -> int:
    from tensorlm.hf.write_config import write_config

    base = Path(args.config) if args.config else None
    write_config(args.hf, base, args.overrides, args.write_config)
    command = shlex.join(["--config", str(args.write_config), "--hf", str(args.hf)])
    print(
        f"{args.write_config}: a configuration for {args.hf}; set [data], [optim] and [train], "
        f"then run: python launcher/convert.py import {command}"
    )
    return 0


def import_(args: argparse.Namespace, config: Config) -> int:
    from tensorlm.hf.import_folder import import_weights
    from tensorlm.hf.imported_tokenizer import describe_another_tokenizer

    folder = import_weights(args.hf, config)
    settings = shlex.join([args.config, *args.overrides])
    print(f"{folder}: weights of {args.hf}; training with --config {settings} starts from them")
    tokenizer = Path(config.data.path) / "tokenizer"
    if note := describe_another_tokenizer(args.hf, tokenizer, config.data.path):
        print(note)
    return 0


def run() -> None:
    """Run this command with the arguments of the process, and end the process."""
    run_launcher(main)
