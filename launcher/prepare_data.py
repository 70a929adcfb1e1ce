"""Prepare data: `python launcher/prepare_data.py encode --input ... --output DATA`."""

from tensorlm.runtime.imports import without_collection

with without_collection():
    from tensorlm.commands.prepare import run

if __name__ == "__main__":
    run()
