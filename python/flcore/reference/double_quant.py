"""Scales in 8 bits: double quantisation; the definition, in NumPy.

The scales of a weight, less their mean, are coded in blocks of 256 in row-major order: a float32
absmax a block and the nearest of 256 fixed numbers of the quotient. Those numbers are a sign, a
decimal exponent of 0 to 6 zeros and a linear fraction; they hold 0 and 1.

Source: Dettmers et al., "QLoRA", arXiv 2305.14314, section 3; the numbers: Dettmers, "8-Bit
Approximations for Parallelism in Deep Learning", arXiv 1511.04561 (dynamic tree data type).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

__all__ = ["BLOCK", "decode_scales", "dynamic_levels", "encode_scales"]

BLOCK = 256


@lru_cache
def dynamic_levels() -> np.ndarray:
    """Return the 256 numbers in ascending order, float32.

    With i zeros fewer than 6 after the decimal point the fraction has 2^i steps between 0.1 and 1,
    each represented by its middle.
    """
    found = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2**i + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        found += [*middles, *-middles]
    return np.sort(np.array(found)).astype(np.float32)


def encode_scales(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Code scales (n, G) float32.

    Returns
    -------
    codes : (n, G) uint8
    absmax : (ceil(n G / 256),) float32
    offset : (1,) float32
        The mean, summed in float64.
    """
    offset = np.array([scales.mean(dtype=np.float64) if scales.size else 0], np.float32)
    rest = scales.reshape(-1) - offset
    blocks = -(-rest.size // BLOCK)
    flat = np.zeros(blocks * BLOCK, np.float32)
    flat[: rest.size] = rest
    padded = flat.reshape(blocks, BLOCK)
    absmax = np.abs(padded).max(axis=1)
    share = padded / np.where(absmax == 0, np.float32(1), absmax)[:, None]
    levels = dynamic_levels().astype(np.float64)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, share)  # a tie: the smaller level
    return (
        codes.astype(np.uint8).reshape(-1)[: rest.size].reshape(scales.shape),
        absmax,
        offset,
    )


def decode_scales(codes: np.ndarray, absmax: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Return float32 scales (n, G): ``level * absmax + offset``, each step rounded."""
    flat = dynamic_levels()[codes.reshape(-1)]
    return (flat * np.repeat(absmax, BLOCK)[: flat.size] + offset[0]).reshape(codes.shape)
