"""Convert weights to and from Hugging Face folders: `python launcher/convert.py export ...`."""

from tensorlm.commands.convert import run

if __name__ == "__main__":
    run()
