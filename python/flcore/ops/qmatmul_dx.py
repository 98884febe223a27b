"""The gradient of a product with a quantized weight with respect to its input."""

from __future__ import annotations

from typing import Any

from flcore import _native, _variants
from flcore.ops._qmatmul_call import QMatmulCall, native, plain, prepare, run

__all__ = ["qmatmul_dx"]


def qmatmul_dx(
    dy: Any,
    weight: Any,
    *,
    low: Any = None,
    up: Any = None,
    out: Any = None,
    variant: str | None = None,
) -> Any:
    r"""``dX = dY W + low up``: what ``y = x W^T`` hands back to its input, from the packed weight.

    W is never written: 128 rows and 128 columns of it at a time are decoded into cache and
    multiplied. A call reads the packed weight once for every 256 rows of `dy`.

    Parameters
    ----------
    dy : array (..., n)
        Gradient of the outputs: NumPy or torch; float32, float16 or bfloat16 (float64 is computed
        by the reference).
    weight : flcore.quantization.QuantizedTensor
        W (n, k), of any scheme; on the device of `dy`.
    low : array (..., rank), optional
        Gradient within adapters, ``alpha / r dY B`` for an output ``alpha / r (x A^T) B^T``.
    up : array (rank, k), optional
        A of the adapters.
    out : array (..., k), optional
        Where the result goes; untouched when the call raises.
    variant : {"reference", "cpu", "triton"}, optional
        Which implementation runs; by default the best for the device.

    Returns
    -------
    array (..., k)
        Of the kind, dtype and device of `dy`; `out` itself if it was given.

    Raises
    ------
    InvalidInputError
        Shapes that do not fit, one of `low` and `up` alone, an `out` that cannot be written.
    DTypeError
        An argument that is no floating array of the library and device of `dy`, or a weight that
        is not quantized.
    VariantUnavailableError
        The named variant cannot run here.

    Notes
    -----
    Sums are float32, over 128 rows of W and then over these partial sums; a row of the result has
    the same bits for any number of threads and whatever the other rows are. With the weight rounded
    to float32, an element is within ``(128 + n / 128 + 2) 2^-24 sum_n |dy w|`` of the exact sum
    before it is rounded to the dtype of `dy`. A row of `dy` with a single 1 gives that row of W.

    bfloat16 and float16 on processors with AVX-512 VNNI: where codes are whole numbers (all schemes
    but nf4, fp4, fp8 and 8 bits with integer zeros), ``dy S`` is rounded to 16 bits, relative to
    the largest ``|dy|`` and ``|S|`` of 256 rows of W, and multiplied exactly. That adds at most
    ``2^-15 max|dy| max|S| sum_n |q - Z|`` for each 256 rows: for normally distributed values a
    thirtieth of what rounding the result to bfloat16 costs. A row of `dy` in which one value is 64
    times (float16: 12 times) the mean of its 256, or that has fewer than 4 values, is multiplied in
    float32. The variant `triton` takes 16 bits of every ``dy S`` of a 16-bit `dy`, which adds at
    most ``2^-16 sum_n |dy w|``.

    References
    ----------
    Dettmers et al., "QLoRA", arXiv 2305.14314.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import qmatmul_dx
    >>> from flcore.quantization import quantize
    >>> w = quantize(np.float32([[1, -2, 3, 0], [0.5, 4, -7, 1]]), "int4")
    >>> bool((qmatmul_dx(np.float32([[0, 1]]), w) == w.dequantize()[1]).all())
    True
    """
    if variant is None and out is None and low is None and up is None:
        found = plain(_native.core.qmatmul_dx_plain, dy, weight, gradient=True)
        if found is not None:
            return found
    call = prepare(dy, weight, low=low, up=up, out=out, gradient=True, name="dy")
    return run("qmatmul_dx", call, variant, name="dy")


# ---- variants ------------------------------------------------------------------------------------


def _qmatmul_dx_cpu(call: QMatmulCall) -> None:
    """csrc/cpu/qmatmul_dx.isa.cpp."""
    weight = call.weight.tiled()
    _native.core.qmatmul_dx(weight.kernel_args(), native(call))


_variants.add("qmatmul_dx", "cpu", _variants.lazy(__name__, "_qmatmul_dx_cpu"), _variants.cpu_only)
_variants.add(
    "qmatmul_dx", "reference", _variants.lazy("flcore.reference.qmatmul_dx", "qmatmul_dx")
)
_variants.add(
    "qmatmul_dx",
    "triton",
    _variants.lazy("flcore.ops._qmatmul_triton", "qmatmul_dx"),
    _variants.needs_triton,
)
