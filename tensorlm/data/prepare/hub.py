"""`hf:` inputs: data sets of the Hugging Face Hub, or local folders, loaded by `datasets`."""

from functools import cache
from pathlib import Path
from typing import Any

from tensorlm.runtime.errors import UserError, first_line

HUB = "hf:"


def parse_hub_name(source: str) -> tuple[str, str, str]:
    """(name, subset, split) of `hf:NAME[:SUBSET[:SPLIT]]`; the default split is train."""
    name, subset, split = (*source.removeprefix(HUB).split(":"), "", "")[:3]
    return name, subset, split or "train"


def dataset_identity(source: str) -> tuple[int, str]:
    """Rows and fingerprint of an `hf:` source: equal in all processes while it is unchanged.

    Raises:
        UserError: it cannot be loaded.
    """
    dataset = open_dataset(source)
    return len(dataset), dataset._fingerprint


@cache
def open_dataset(source: str) -> Any:
    """Open a `datasets` data set, once per process, since opening may use the network."""
    import datasets

    name, subset, split = parse_hub_name(source)
    try:
        if (Path(name) / "dataset_info.json").exists():
            return datasets.load_from_disk(name)
        if (Path(name) / "dataset_dict.json").exists():
            return datasets.load_from_disk(name)[split]
        return datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # builders raise exceptions of any class
        raise UserError(f"{source}: cannot be loaded by datasets ({first_line(error)})") from None
