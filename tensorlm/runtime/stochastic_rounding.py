"""Stochastic rounding to bfloat16: up or down by chance, so that the mean is what was rounded.

Rounding to the nearest swallows every change of less than half a unit in the last place, and with
it all that an average of many small changes would come to. The chance here is a function of a key
and of an element's place alone: the same on any device, however the elements are divided.
"""

import hashlib

import torch
from torch import Tensor

_LOW_BITS = 0xFFFF  # of a float32, those that bfloat16 has not
_FIRST, _SECOND = 0x85EBCA6B, 0xC2B2AE35  # MurmurHash3's finalizer (Appleby, 2011)


def random_words(key: str, first: int, count: int, device: torch.device) -> Tensor:
    """[count] int32: random bits of the elements first ... first + count of whatever `key` names.

    A hash of place and key, so that any element's bits are found without those before it.
    """
    digest = hashlib.sha256(key.encode()).digest()
    start, middle = (int.from_bytes(digest[at : at + 4]) for at in (0, 4))
    words = torch.arange(count, dtype=torch.int32, device=device)
    words += _signed(first + start)
    words ^= (words >> 16).bitwise_and_(0xFFFF)  # shifts of int32 copy the sign
    words *= _signed(_FIRST)
    words ^= _signed(middle)
    words ^= (words >> 13).bitwise_and_(0x7FFFF)
    words *= _signed(_SECOND)
    words ^= (words >> 16).bitwise_and_(0xFFFF)
    return words


def round_into(kept: Tensor, exact: Tensor, noise: Tensor) -> None:
    """Round `exact` (float32) into `kept` (bfloat16) with 16 random bits an element.

    Args:
        kept: [n].
        exact: [n], finite.
        noise: [n] int32, from 0 to 0xFFFF; overwritten.
    """
    # Sign and magnitude: what is added carries into the bits that stay as often as it should.
    noise += exact.view(torch.int32)
    noise &= ~_LOW_BITS
    kept.copy_(noise.view(torch.float32))


def _signed(word: int) -> int:
    """The int32 that has the low 32 bits of `word`."""
    word &= 0xFFFF_FFFF
    return word - (1 << 32) if word >> 31 else word
