"""Product with a quantized weight, ``y = x W^T + bias + low up^T``: the definition, in float64.

W[n, k] is the weight that its codes stand for, not rounded to float32: ``(q - Z) S``,
``(q - 2^(b - 1)) S + zero``, ``table[q] S`` or ``fp8(q) S``; see `flcore.reference.weight_quant`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore import _arrays

__all__ = ["qmatmul"]


def qmatmul(call: Any) -> None:
    """Write one product; `call` is a `flcore.ops._qmatmul_call.QMatmulCall`.

    The result is rounded once, to the dtype of x.
    """
    n, k = call.weight.shape
    m = int(call.x.shape[0])
    w = _arrays.to_float64(call.weight.dequantize("float64")).reshape(n, k)
    with np.errstate(over="ignore", invalid="ignore"):  # x may hold anything; y may be too large
        y = _arrays.to_float64(call.x).reshape(m, k) @ w.T
        if call.rank:
            low = _arrays.to_float64(call.low).reshape(m, call.rank)
            y += low @ _arrays.to_float64(call.up).reshape(n, call.rank).T
        if call.bias is not None:
            y += _arrays.to_float64(call.bias)
        _arrays.assign(call.out, y)
