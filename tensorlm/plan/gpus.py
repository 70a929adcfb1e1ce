"""GPUs for plans: figures from data sheets, and the shares of them that training reaches."""

from dataclasses import dataclass

from tensorlm.model.flops import GPU_PEAKS
from tensorlm.runtime.errors import UserError

GIB = 2**30

# Shares of the data sheet. A product of 8192^3 reaches 0.8 of an H100's peak and a copy 0.9 of its
# bandwidth (kernels/README.md); a layer's products are smaller, and its other kernels less simple.
MATMUL_SHARE = 0.70
BANDWIDTH_SHARE = 0.80
# FLOP/s of a layer's products in float8, casts included, as a share of the bf16 peak: one H200,
# Llama-8B's layers, 32,768 tokens (docs/performance.md).
FLOAT8_SHARE = {"float8_tensorwise": 1.19, "float8_rowwise": 1.14}
LINK_SHARE = 0.80
ZERO_SHARE = 0.52  # of NVLink, for ZeRO's exchanges: two H200 (docs/performance.md)
SWAP_SHARE = 0.44  # of NVLink, packing included: two H200 (docs/sequence_parallelism.md)

# FLOP/s of tensorized attention, and of full attention by the same kernels, as shares of the peak:
# both measured on H100 and H200 (kernels/README.md, "Measured").
FOLDED_SHARE = (0.30, 0.21)  # forward, backward
FULL_SHARE = (0.46, 0.37)
# The same for a window, a routed hop and the scores of a choice, measured on an H200 with 131,072
# tokens, window 1,024 and 16 blocks of 64 (same section; 32,768 tokens agree within 5 %). For the
# routed hop, FLOPs count the pairs of each token's own choice; the time is that of the union of a
# tile's choices.
WINDOW_SHARE = (0.47, 0.31)
ROUTED_SHARE = (0.18, 0.14)
CHOICE_SHARE = 0.20

# Bytes/s of PyTorch's AdamW on the CPU, on one rank's share of the cores. An assumption.
HOST_BANDWIDTH = 20e9


@dataclass(frozen=True)
class Gpu:
    """One GPU, from its data sheet; bandwidths in bytes/s, of links one way.

    `memory` is what a program can allocate, in bytes, which is less than on the data sheet.
    """

    name: str
    memory: float
    flops: float  # dense bf16, FLOP/s
    bandwidth: float  # of its memory
    nvlink: float  # to the other GPUs of its node
    network: float  # to other nodes: one adapter per GPU
    host_link: float  # PCI Express
    per_node: int = 8


# NVIDIA's data sheets of the SXM boards; network adapters of each generation's DGX.
GPUS = {
    "a100": Gpu("A100", 79 * GIB, GPU_PEAKS["A100"], 2.04e12, 300e9, 25e9, 32e9),
    "h100": Gpu("H100", 78 * GIB, GPU_PEAKS["H100"], 3.35e12, 450e9, 50e9, 64e9),
    "h200": Gpu("H200", 139 * GIB, GPU_PEAKS["H200"], 4.8e12, 450e9, 50e9, 64e9),
    "b200": Gpu("B200", 178 * GIB, GPU_PEAKS["B200"], 8.0e12, 900e9, 50e9, 64e9),
}


def find_gpu(text: str) -> Gpu:
    """Find a GPU by name, or by its GiB of memory (all other figures are then an H100's).

    Raises:
        UserError: `text` is neither a known name nor a positive number.
    """
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        gib = float(text.lower().removesuffix("gib"))
    except ValueError:
        gib = 0.0
    if not 0 < gib < float("inf"):
        raise UserError(f"--gpu: must be {', '.join(GPUS)} or GiB of memory, got {text}")
    sheet = GPUS["h100"]
    return Gpu(
        f"GPU with {gib:g} GiB (otherwise H100)", gib * GIB, sheet.flops, sheet.bandwidth,
        sheet.nvlink, sheet.network, sheet.host_link,
    )  # fmt: skip
