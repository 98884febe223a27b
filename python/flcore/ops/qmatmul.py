"""The product of activations with a weight of 2 to 8 bits."""

from __future__ import annotations

from typing import Any

from flcore import _native, _variants
from flcore.ops._qmatmul_call import QMatmulCall, native, plain, prepare, run

__all__ = ["qmatmul"]


def qmatmul(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    low: Any = None,
    up: Any = None,
    out: Any = None,
    variant: str | None = None,
) -> Any:
    r"""``y = x W^T + bias + low up^T`` with W in 2, 3, 4 or 8 bits, never written unpacked.

    Few rows of x (up to 8) multiply codes as they are decoded in registers: the time is that of
    reading the codes. More rows share panels of W that are decoded into cache.

    Parameters
    ----------
    x : array (..., k), float32, float16 or bfloat16
        NumPy or torch, any strides. float64 is computed by the reference.
    weight : flcore.quantization.QuantizedTensor
        W (n, k), any scheme, on the device of `x`.
    bias : array (n,), optional
        Any floating dtype; rounded to float32.
    low : array (..., rank), optional
        Left factor of an adapter, ``alpha / r x A^T``; rounded to float32, as is `up`.
    up : array (n, rank), optional
        B of the adapter.
    out : array (..., n), optional
        Where the result goes, of the dtype of `x`; untouched when the call raises.
    variant : {"reference", "cpu", "triton", "cuda"}, optional
        Which implementation runs; by default the best for the device.

    Returns
    -------
    array (..., n)
        Of the kind, dtype and device of `x`; `out` itself if it was given.

    Raises
    ------
    InvalidInputError
        Shapes that do not fit, one of `low` and `up` alone, an `out` that cannot be written.
    DTypeError
        An argument that is no floating array of the library and device of `x`, or a weight that
        is not quantized.
    VariantUnavailableError
        The named variant cannot run here.

    Notes
    -----
    Sums are float32; the bits do not depend on the number of threads, but may on the instruction
    set and on the number of rows. On a CPU nothing is rounded to less than float32 on the way but
    levels of a codebook beside a bfloat16 `x`, which AVX512_BF16 takes in bfloat16 (2^-8 of a level
    at most; QLoRA, equation 5, rounds the whole weight): where pairs of bfloat16 are multiplied, x
    and all other codes are exact in it; where digits of 8 bits are (up to four rows, weights of
    integers), x is taken to 2^-31 of the largest of the up to 256 values of its group. But for
    these levels a row of `x` with a single 1 gives that column of W as float32 has it, and products
    of small whole numbers are exact. A row of `x` that is not finite has results
    that are not finite.

    The variant `cuda` multiplies float16 or bfloat16; see its file for what is rounded. `triton`
    rounds nothing on the way either, but takes the levels of a codebook with 16 of their bits in
    products of more than 64 rows. Its bits are the same in every run on one kind of GPU.

    References
    ----------
    Lin et al., "AWQ", MLSys 2024, arXiv 2306.00978 (products from packed 4-bit weights); Guo et
    al., "FLUTE", EMNLP Findings 2024, arXiv 2407.10960 (codes as indices of a table); Hu et al.,
    "LoRA", arXiv 2106.09685 (the term of low rank); Dettmers et al., "QLoRA", arXiv 2305.14314.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import qmatmul
    >>> from flcore.quantization import quantize
    >>> w = quantize(np.float32([[1, -2, 3, 0], [0.5, 4, -7, 1]]), "int4")
    >>> bool((qmatmul(np.float32([[0, 1, 0, 0]]), w) == w.dequantize()[:, 1]).all())
    True
    """
    if variant is None and out is None and bias is None and low is None and up is None:
        found = plain(_native.core.qmatmul_plain, x, weight)
        if found is not None:
            return found
    return run("qmatmul", prepare(x, weight, bias, low=low, up=up, out=out), variant)


# ---- variants ------------------------------------------------------------------------------------


def _qmatmul_cpu(call: QMatmulCall) -> None:
    """csrc/cpu/qmatmul.isa.cpp."""
    _native.core.qmatmul(call.weight.kernel_args(), native(call))


_variants.add("qmatmul", "cpu", _variants.lazy(__name__, "_qmatmul_cpu"), _variants.cpu_only)
_variants.add("qmatmul", "reference", _variants.lazy("flcore.reference.qmatmul", "qmatmul"))
_variants.add(
    "qmatmul",
    "triton",
    _variants.lazy("flcore.ops._qmatmul_triton", "qmatmul"),
    _variants.needs_triton,
)
_variants.add(
    "qmatmul",
    "cuda",
    _variants.lazy("flcore.ops._qmatmul_cuda", "qmatmul"),
    _variants.needs_cuda,
)
