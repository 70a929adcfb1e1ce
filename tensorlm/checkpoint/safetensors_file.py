"""Streaming writer of safetensors files: hashes while writing, holds no tensor twice.

`safetensors.torch.save_file` needs all tensors of a file at once, and does not hash. Format: the
header size in 8 bytes (little endian), a JSON header, then the tensors in order.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorlm.runtime import disk

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_safetensors(
    path: Path,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    pieces: Iterable[Tensor],
    progress: Callable[[int], object] = lambda num_bytes: None,
    metadata: dict[str, str] | None = None,
) -> tuple[int, str]:
    """Write a new file, durably.

    Args:
        path: the file; it must not exist.
        shapes: shapes of the tensors by name, in the order in which they are written.
        dtype: dtype of all tensors, one of DTYPES.
        pieces: the elements in that order, as contiguous CPU tensors of `dtype`, of any sizes.
        progress: called with the number of bytes just written.
        metadata: strings for the header.

    Returns:
        Size of the file in bytes, and its sha256.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {
            "dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for piece in pieces:
            yield piece.view(torch.uint8).numpy().data

    return disk.write_file(path, parts(), progress)
