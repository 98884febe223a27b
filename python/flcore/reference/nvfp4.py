"""NVFP4: e2m1 codes in blocks of 16 with e4m3 scales, and one float32 scale for the weight.

One level: ``S = e4m3(absmax / 6)``. Two levels: ``t = absmax of the weight / (448 * 6)`` in float32
and ``S = e4m3((absmax / 6) / t)``; a weight is ``level * S * t``. Source: NVIDIA's description of
the format; the numbers of e2m1 and e4m3 are those of OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

import numpy as np

from flcore.reference import weight_quant as wq
from flcore.reference.weight_rules import minifloat_codes, nearest_codes

__all__ = ["BLOCK", "block_scales", "quantize"]

BLOCK = 16
LARGEST, LARGEST_SCALE = 6.0, 448.0  # of e2m1 and of e4m3


def block_scales(scale_codes: np.ndarray, tensor_scale: float) -> np.ndarray:
    """Return the float32 scales (n, G) of e4m3 bytes and the scale of the weight."""
    return (wq.code_levels(8, wq.E4M3)[scale_codes] * np.float64(tensor_scale)).astype(np.float32)


def quantize(w: np.ndarray, two_levels: bool = True) -> tuple[np.ndarray, np.ndarray, float]:
    """Quantise a finite float32 weight (n, k).

    Returns
    -------
    codes : (n, k) uint8
    scale_codes : (n, ceil(k / 16)) uint8
        Bytes of e4m3.
    tensor_scale : float
        A float32 number; 1 for one level.
    """
    n, k = w.shape
    count = wq.groups(k, BLOCK)
    blocks = np.zeros((n, count * BLOCK), np.float32)
    blocks[:, :k] = w
    tops = np.abs(blocks.reshape(n, count, BLOCK)).max(axis=-1, initial=0)
    t = np.float32(1)
    if two_levels and tops.any():
        t = np.float32(tops.max() / (LARGEST_SCALE * LARGEST))
    scale_codes = minifloat_codes(tops / np.float32(LARGEST) / t, wq.E4M3)
    s = wq.spread(block_scales(scale_codes, float(t)), k, BLOCK)
    v = np.divide(w, s, out=np.zeros_like(w), where=s > 0)
    return nearest_codes(v, wq.CODEBOOKS["e2m1"]), scale_codes, float(t)
