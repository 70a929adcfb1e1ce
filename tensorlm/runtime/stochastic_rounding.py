"""Stochastic rounding to bfloat16: up or down at random, so that the mean is exact.

Rounding to nearest loses every change of less than half a unit in the last place, and so the sum of
many small changes. The random bits depend only on a key and on the element's index: they are the
same on any device and for any division of the elements among ranks.
"""

import hashlib

import torch
from torch import Tensor

_LOW_BITS = 0xFFFF  # the bits of a float32 that bfloat16 drops
FIRST, SECOND = 0x85EBCA6B, 0xC2B2AE35  # MurmurHash3's finalizer (Appleby, 2011)


def random_words(key: str, first: int, count: int, device: torch.device) -> Tensor:
    """[count] int32: random bits of the elements from `first` on of the tensor that `key` names.

    They are a hash of index and key, so any element's bits can be computed without earlier ones.
    """
    start, middle = key_words(key, first)
    words = torch.arange(count, dtype=torch.int32, device=device)
    words += start
    words ^= (words >> 16).bitwise_and_(0xFFFF)  # shifts of int32 copy the sign
    words *= _signed(FIRST)
    words ^= middle
    words ^= (words >> 13).bitwise_and_(0x7FFFF)
    words *= _signed(SECOND)
    words ^= (words >> 16).bitwise_and_(0xFFFF)
    return words


def key_words(key: str, first: int) -> tuple[int, int]:
    """What the hash adds to an element's index counted from `first`, and mixes in later (int32)."""
    digest = hashlib.sha256(key.encode()).digest()
    start, middle = (int.from_bytes(digest[at : at + 4]) for at in (0, 4))
    return _signed(first + start), _signed(middle)


def round_into(kept: Tensor, exact: Tensor, noise: Tensor) -> None:
    """Round `exact` (float32) into `kept` (bfloat16) with 16 random bits per element.

    Args:
        kept: [n]; overwritten.
        exact: [n], finite.
        noise: [n] int32, from 0 to 0xFFFF; overwritten.
    """
    # In sign and magnitude, the sum carries into the kept bits with the right probability.
    noise += exact.view(torch.int32)
    noise &= ~_LOW_BITS
    kept.copy_(noise.view(torch.float32))


def _signed(word: int) -> int:
    """The int32 that has the low 32 bits of `word`."""
    word &= 0xFFFF_FFFF
    return word - (1 << 32) if word >> 31 else word
