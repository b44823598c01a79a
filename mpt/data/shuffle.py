"""Seeded shuffles that need no memory: a hash of integers and a bijection on [0, m)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint64]

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""Step of splitmix64 (Steele, Lea, Flood 2014): 2**64 over the golden ratio, made odd."""
FEISTEL_ROUNDS = 6


def mix(*words: ArrayLike) -> Words:
    """Hash integers to 64 bits; arguments broadcast against each other.

    Returns:
        uint64 (n,), n >= 1. Stable: the order of every run's samples hangs on these bits.
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        state = _finalise((state + GOLDEN_GAMMA) ^ np.atleast_1d(word).astype(np.uint64))
    return state


def permute(index: Words, size: Words, key: Words) -> Words:
    """Return where shuffles of [0, size) put each index: a bijection for each size and key.

    An alternating Feistel network on the next power of two above `size`, walked along its
    cycles until the value is below `size` (Black and Rogaway 2002): under two walks on average.

    Args:
        index: uint64 (n,), each below its size.
        size: uint64 (n,), at least 1 and at most 2**62.
        key: uint64 (n,), which of the shuffles.

    Returns:
        uint64 (n,), each below its size.
    """
    bits = _bit_length(size - np.uint64(1)).astype(np.uint64)
    result: Words = _feistel(index, bits, key)
    while (outside := np.flatnonzero(result >= size)).size:
        result[outside] = _feistel(result[outside], bits[outside], key[outside])
    return result


def _feistel(index: Words, bits: Words, key: Words) -> Words:
    low_bits = bits // np.uint64(2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << (bits - low_bits)) - np.uint64(1)
    low, high = index & low_mask, index >> low_bits
    for number in range(1, FEISTEL_ROUNDS + 1):
        round_key = key + np.full(1, number, np.uint64) * GOLDEN_GAMMA
        if number % 2:
            low = low ^ (_finalise(high + round_key) & low_mask)
        else:
            high = high ^ (_finalise(low + round_key) & high_mask)
    joined: Words = (high << low_bits) | low
    return joined


def _finalise(words: Words) -> Words:
    """Scatter each word over all 64 bits: splitmix64's finaliser, itself a bijection."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scattered: Words = words ^ (words >> np.uint64(31))
    return scattered


def _bit_length(words: Words) -> NDArray[np.int32]:
    """Return bits needed per word; above 2**53 rounding may add one, the same everywhere."""
    exponents: NDArray[np.int32] = np.frexp(words.astype(np.float64))[1]
    return exponents
