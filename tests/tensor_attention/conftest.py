"""Without a CUDA device the Triton kernels of this folder's tests run in Triton's interpreter."""

import os

import torch

# Triton reads it when a kernel is defined, so it must be set before the kernels are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
