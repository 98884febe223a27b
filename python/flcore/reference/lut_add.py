"""Codes looked up and added as integers: the definition in NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flcore.reference import buckets

__all__ = ["lut_add"]


def lut_add(
    packets: Sequence[np.ndarray], tables: Sequence[np.ndarray], bits: int, codes: int
) -> np.ndarray:
    """Return ``sum_i tables[i][code j of packet i]`` for every j, int64 (codes,).

    Parameters
    ----------
    packets : sequence of uint8 arrays
        Codes of `bits` bits each, packed little-endian.
    tables : sequence of (2**bits,) integer arrays
        One a packet.
    """
    total = np.zeros(codes, np.int64)
    for packed, table in zip(packets, tables, strict=True):
        total += np.asarray(table, np.int64)[buckets.unpack(packed, codes, bits, max(codes, 1))]
    return total
