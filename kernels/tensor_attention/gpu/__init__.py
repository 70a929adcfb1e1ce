"""Triton kernels of the hops and their operators."""
