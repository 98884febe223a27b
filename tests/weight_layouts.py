"""What tests of foreign layouts share: random codes, and what they stand for, value by value."""

from __future__ import annotations

import numpy as np

from flcore.quantization import QuantizedTensor
from flcore.reference import weight_quant as wq

ONE_TO_EIGHT = np.arange(1, 9, dtype=np.uint8)


def codes_of(tensor: QuantizedTensor) -> np.ndarray:
    return wq.unpack_rows(tensor.codes, tensor.shape[1], tensor.scheme.bits)


def draw(rng, n: int, k: int, group: int, bits: int, dtype: str = "float16"):
    """Codes (n, k), scales and zeros (n, G)."""
    q = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    count = -(-k // group)
    scales = rng.uniform(0.001, 0.1, (n, count)).astype(dtype)
    return q, scales, rng.integers(0, 2**bits, (n, count)).astype(np.uint8)


def expected(q, scales, zeros, group: int) -> np.ndarray:
    """(q - z) s in float64, one value at a time."""
    w = np.empty(q.shape)
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            w[i, j] = (float(q[i, j]) - float(zeros[i, j // group])) * float(scales[i, j // group])
    return w
