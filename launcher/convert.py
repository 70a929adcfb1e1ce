"""Convert weights between checkpoints and Hugging Face folders.

launcher/convert.py export --config C --output DIR [--checkpoint STEP] [--dtype bf16]
launcher/convert.py import --config C --hf DIR
"""

import argparse
from pathlib import Path

from tensorlm.config import load_config, parse_config
from tensorlm.errors import run_launcher


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", required=True, help="TOML file of the run")
    common.add_argument("overrides", nargs="*", metavar="key.sub=value")
    export = commands.add_parser("export", parents=[common], help="checkpoint -> Hugging Face")
    export.add_argument("--output", type=Path, required=True, help="new folder")
    export.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    export.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    export.add_argument("--tokenizer", type=Path, help="default: that of the data set")
    imported = commands.add_parser("import", parents=[common], help="Llama folder -> checkpoint 0")
    imported.add_argument("--hf", type=Path, required=True, help="folder with Llama weights")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)

    from tensorlm.checkpoint import select_checkpoint
    from tensorlm.hf.convert import export_checkpoint, import_weights

    if args.command == "export":
        checkpoint = select_checkpoint(Path(config.run.dir), args.checkpoint)
        trained = parse_config(checkpoint.manifest["config"], str(checkpoint.folder))
        beside_data = Path(config.data.path) / "tokenizer"
        tokenizer = args.tokenizer or (beside_data if beside_data.exists() else None)
        export_checkpoint(checkpoint, trained, args.output, args.dtype, tokenizer)
        print(f"{args.output}: step {checkpoint.step} of {config.run.dir}, {args.dtype}")
    else:
        folder = import_weights(args.hf, config)
        print(f"{folder}: weights of {args.hf}; training with --config {args.config} starts there")
    return 0


if __name__ == "__main__":
    run_launcher(main)
