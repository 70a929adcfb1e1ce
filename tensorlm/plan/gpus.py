"""The GPUs that a run can be planned for: figures of their data sheets, and the shares of them
that training reaches.
"""

from dataclasses import dataclass

from tensorlm.model.flops import GPU_PEAKS
from tensorlm.runtime.errors import UserError

GIB = 2**30

# Shares of the data sheet. A product of 8192^3 reaches 0.8 of an H100's peak and a copy 0.9 of its
# bandwidth (kernels/README.md); a layer's products are smaller, other kernels less simple.
MATMUL_SHARE = 0.70
BANDWIDTH_SHARE = 0.80
LINK_SHARE = 0.80
SWAP_SHARE = 0.44  # of NVLink, packing included: two H200 (docs/sequence_parallelism.md)

# Tensorized attention, FLOPs per second as a share of the peak, and full attention by the same
# kernels: both measured on H100 and H200 (kernels/README.md, "Measured").
FOLDED_SHARE = (0.30, 0.21)  # forward, backward
FULL_SHARE = (0.46, 0.37)
# A window, a routed hop, and the scores of a choice: H200, 131,072 tokens, window 1,024, 16 blocks
# of 64 (the same place; 32,768 tokens follow to 4 %). Of the routed hop, the pairs of a token's
# own choice count, and the time is of the union of a tile's.
WINDOW_SHARE = (0.40, 0.29)
ROUTED_SHARE = (0.17, 0.12)
CHOICE_SHARE = 0.077

# CPU and host of one rank: AdamW of PyTorch on its share of the cores, in bytes/s. An assumption.
HOST_BANDWIDTH = 20e9


@dataclass(frozen=True)
class Gpu:
    """One GPU as its data sheet has it; bandwidths in bytes/s, links one way.

    `memory` is what a program can allocate, in bytes: less than the sheet's gigabytes.
    """

    name: str
    memory: float
    flops: float  # dense bf16, FLOP/s
    bandwidth: float  # of its memory
    nvlink: float  # to the other GPUs of its node
    network: float  # to other nodes: one adapter a GPU
    host_link: float  # PCI Express
    per_node: int = 8


# NVIDIA data sheets of the SXM boards; network adapters of the DGX of each generation.
GPUS = {
    "a100": Gpu("A100", 79 * GIB, GPU_PEAKS["A100"], 2.04e12, 300e9, 25e9, 32e9),
    "h100": Gpu("H100", 78 * GIB, GPU_PEAKS["H100"], 3.35e12, 450e9, 50e9, 64e9),
    "h200": Gpu("H200", 139 * GIB, GPU_PEAKS["H200"], 4.8e12, 450e9, 50e9, 64e9),
    "b200": Gpu("B200", 178 * GIB, GPU_PEAKS["B200"], 8.0e12, 900e9, 50e9, 64e9),
}


def find_gpu(text: str) -> Gpu:
    """A GPU by name, or one with so many GiB and otherwise an H100.

    Raises:
        UserError: neither a known name nor a positive number.
    """
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        gib = float(text.lower().removesuffix("gib"))
    except ValueError:
        gib = 0.0
    if not 0 < gib < float("inf"):
        raise UserError(f"--gpu: {text} is unknown (valid: {', '.join(GPUS)}, or GiB of memory)")
    sheet = GPUS["h100"]
    return Gpu(
        f"GPU of {gib:g} GiB, else as an H100", gib * GIB, sheet.flops, sheet.bandwidth,
        sheet.nvlink, sheet.network, sheet.host_link,
    )  # fmt: skip
