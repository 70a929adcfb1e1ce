"""The weight files of a Hugging Face folder, chosen as transformers chooses them."""

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from tensorlm.runtime.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = "adapter_config.json"
_KEY = "transformers_weights"  # in config.json: a file of another name


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the weights, in the order in which transformers reads them.

    Precedence: the file named in config.json, then `model.safetensors`, then an index. So an index
    left behind by an earlier save is not read.

    Raises:
        UserError: there are no such files, config.json or the index names a file outside the
            folder, or an adapter would change the weights.
    """
    if (folder / _ADAPTER).is_file():
        raise UserError(
            f"{folder}: must contain merged weights, got an adapter, {_ADAPTER} (merge it into the "
            "model and save that, or remove the file)"
        )
    named = _named_file(folder)
    if named is not None:
        return _indexed_files(named) if named.suffix == ".json" else [named]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _indexed_files(folder / INDEX)
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    found = f", got {pickles[0]}" if pickles else ""
    raise UserError(
        f"{folder}: must contain {SINGLE} or its index{found} (save the model as safetensors)"
    )


def check_finite(folder: Path, name: str, weight: Tensor) -> None:
    """Raise UserError, naming the weight, unless all its elements are finite."""
    for value in weight.aminmax() if weight.numel() else ():  # both are nan if any element is
        if not math.isfinite(value):
            raise UserError(
                f"{folder}: {name} must be finite, got {float(value)} (fetch the folder again)"
            )


def _named_file(folder: Path) -> Path | None:
    """The weight file or index named in config.json, or None."""
    try:
        name = json.loads((folder / "config.json").read_bytes()).get(_KEY)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # reported when the configuration is read
    if name is None:
        return None
    endings = (".safetensors", ".safetensors.index.json")
    if not isinstance(name, str) or not name.endswith(endings) or not _is_inside(name):
        raise UserError(
            f"{folder / 'config.json'}: {_KEY} must be a safetensors file in this folder, got "
            f"{json.dumps(name)} (remove the key, or correct it)"
        )
    return folder / name


def _indexed_files(index: Path) -> list[Path]:
    try:
        names: set[Any] = set(json.loads(index.read_bytes())["weight_map"].values())
        if names and all(map(_is_inside, names)):
            return [index.parent / name for name in sorted(names)]
    except OSError as error:
        raise UserError(f"{index}: {error.strerror} (fetch the file again)") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{index}: must be an index of weights (fetch the file again)")


def _is_inside(name: str) -> bool:
    """Whether a relative path stays inside its folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts
