"""Convert weights to and from Hugging Face folders: `python launcher/convert.py export ...`."""

from tensorlm.runtime.imports import without_collection

with without_collection():
    from tensorlm.commands.convert import run

if __name__ == "__main__":
    run()
