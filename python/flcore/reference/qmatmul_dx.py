"""Gradient of a product with a quantized weight: ``dX = dY W + low up``; the definition."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore import _arrays

__all__ = ["qmatmul_dx"]


def qmatmul_dx(call: Any) -> None:
    """Write ``dY W + low up`` of a `flcore.ops._qmatmul_call.QMatmulCall`, in float64.

    W (n, k) is the weight its codes stand for, not rounded; dY is (m, n), low (m, rank) and
    up (rank, k). The result is rounded once, to the dtype of dY.

    References
    ----------
    Dettmers et al., "QLoRA", arXiv 2305.14314, section 3: the gradient with respect to the input of
    a layer whose weight is frozen, here with adapters ``low = alpha / r dY B`` and ``up = A``.
    """
    n, k = call.weight.shape
    m = int(call.x.shape[0])
    w = _arrays.to_float64(call.weight.dequantize("float64")).reshape(n, k)
    result = _arrays.to_float64(call.x).reshape(m, n) @ w
    if call.rank:
        low = _arrays.to_float64(call.low).reshape(m, call.rank)
        result += low @ _arrays.to_float64(call.up).reshape(call.rank, k)
    with np.errstate(over="ignore"):  # beyond the dtype of dY: an infinity
        _arrays.assign(call.out, result)
