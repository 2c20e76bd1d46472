"""Pseudorandom numbers that are a pure function of their arguments.

Splits, orders and samples are drawn with these and not with NumPy's generators, whose methods may
give different numbers in another NumPy release: a run must resume exactly after an upgrade.
"""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int, UInt64

_WEYL = 0x9E3779B97F4A7C15


def mix(values: UInt64[np.ndarray, "..."], seed: int) -> UInt64[np.ndarray, "..."]:
    """A 64-bit hash of each (value, seed); every bit of it depends on both.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014),
    SplitMix64's finaliser.
    """
    x = values + np.uint64((seed * _WEYL + 0x632BE59BD9B4E019) % 2**64)
    for _ in range(2):  # with one round, neighbouring seeds give shifted copies of one sequence
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = (x ^ (x >> np.uint64(31))) ^ np.uint64(seed % 2**64)
    return x


def threshold(fraction: float) -> np.uint64:
    """The bound below which a uniform 64-bit hash falls with probability `fraction` in [0, 1)."""
    return np.uint64(int(fraction * 2**64))


def hash_bytes(data: bytes) -> int:
    """A 64-bit hash of `data`."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def split_keys(hashes: UInt64[np.ndarray, " N"], seed: int) -> UInt64[np.ndarray, " N"]:
    """The split key of each document, from the hash of its text.

    Documents whose key is below ``threshold(fraction)`` are held out from training.
    """
    return mix(hashes, 2 * seed)


def permutation(size: int, *seeds: int) -> Int[np.ndarray, " N"]:
    """A shuffled `arange(size)` (int64) that depends on all of `seeds`."""
    keys = np.arange(size, dtype=np.uint64)
    for seed in seeds:
        keys = mix(keys, seed)
    return np.argsort(keys, kind="stable")
