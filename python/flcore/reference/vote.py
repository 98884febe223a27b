"""Majority of packed signs: the definition.

With s_ij = -1 where bit j of client i is set, else +1:

sums      V_j = sum_i w_i s_ij, float32 in client order, each sum rounded (w_i = 1 without weights)
signs     -1, 0 or +1: the sign of V_j; without weights from the exact count of the bits
bits      1 where the sign is -1, so that a tie is +1; bits after the last coordinate are 0

Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault Tolerant",
ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["FORMS", "negatives", "vote"]

FORMS = ("bits", "signs", "sum")  # enum VoteForm in csrc/api.h


def negatives(codes: np.ndarray, bucket: int, numel: int) -> np.ndarray:
    """Return (numel,) bool, True where a coordinate is negative; buckets start at a byte each."""
    stride = -(-bucket // 8)
    whole = numel // bucket
    bits = np.unpackbits(codes[: whole * stride].reshape(whole, stride), axis=1, bitorder="little")
    rest = np.unpackbits(codes[whole * stride :], bitorder="little")
    return np.concatenate([bits[:, :bucket].reshape(-1), rest[: numel - whole * bucket]]) != 0


def vote(
    rows: Sequence[tuple[np.ndarray, int]],
    numel: int,
    weights: Sequence[float] | None,
    form: str,
) -> np.ndarray:
    """Return the vote over `rows`, each (codes, bucket)."""
    if weights is None and form != "sum":
        count = np.zeros(numel, np.int64)
        for codes, bucket in rows:
            count += negatives(codes, bucket, numel)
        signs = np.sign(len(rows) - 2 * count).astype(np.float32)
    else:
        total = np.zeros(numel, np.float32)
        for (codes, bucket), w in zip(rows, weights or [1.0] * len(rows), strict=True):
            weight = np.float32(w)
            total = total + np.where(negatives(codes, bucket, numel), -weight, weight)
        if form == "sum":
            return total
        signs = np.sign(total)
    return np.packbits(signs < 0, bitorder="little") if form == "bits" else signs
