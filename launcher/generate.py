"""Generate text: `python launcher/generate.py --model DIR --prompt TEXT`."""

from tensorlm.commands.generate import run

if __name__ == "__main__":
    run()
