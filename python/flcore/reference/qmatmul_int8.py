"""Product of quantised activations with a quantized weight: the definition, in float64.

``y = x' W^T + bias + low up^T`` with ``x' = s (q - z)``, what `flcore.reference.act_quant` makes of
x in blocks of a row. Grouped by blocks b of k within which all scales are constant, the form of
kernels with integer sums:

    y[m, n] = sum_b s[m, b] S[n, b] (sum_k q c - Z sum_k q - z sum_k c + |b| z Z)

c the codes of W and Z their zero point.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore import _arrays
from flcore.reference.act_quant import quantize_activation

__all__ = ["qmatmul_int8"]


def qmatmul_int8(call: Any) -> None:
    """Write one product; `call` is a `flcore.ops._qmatmul_call.QMatmulCall`.

    x is rounded to float32 first; the result is rounded once, to the dtype of x.
    """
    n, k = call.weight.shape
    m = int(call.x.shape[0])
    w = _arrays.to_float64(call.weight.dequantize("float64")).reshape(n, k)
    with np.errstate(over="ignore", invalid="ignore"):  # x may hold anything; y may be too large
        x = _arrays.to_float64(call.x).reshape(m, k).astype(np.float32)
        block = call.act_block if 0 < call.act_block < k else max(k, 1)
        codes, scales, _, zeros = quantize_activation(x, block, call.asymmetric)
        centred = codes.astype(np.float64) - np.repeat(zeros, block, axis=1)[:, :k]
        y = (centred * np.repeat(scales.astype(np.float64), block, axis=1)[:, :k]) @ w.T
        if call.rank:
            low = _arrays.to_float64(call.low).reshape(m, call.rank)
            y += low @ _arrays.to_float64(call.up).reshape(n, call.rank).T
        if call.bias is not None:
            y += _arrays.to_float64(call.bias)
        _arrays.assign(call.out, y)
