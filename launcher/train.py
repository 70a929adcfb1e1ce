"""Train a model: `deepspeed launcher/train.py --config configs/demo.toml [key.sub=value ...]`."""

from tensorlm.commands.train import run

if __name__ == "__main__":
    run()
