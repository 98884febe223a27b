"""The product of activations, quantised to 8 bits on the way, with a weight of 2 to 8 bits."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from flcore import _arrays, _native, _variants
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops._qmatmul_call import QMatmulCall, native, plain, prepare, run

__all__ = ["qmatmul_int8"]

KINDS = ("symmetric", "integer_zero", "float_zero")  # codes that stand for integers


def qmatmul_int8(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    act_block: int | None = None,
    asymmetric: bool = False,
    low: Any = None,
    up: Any = None,
    out: Any = None,
    variant: str | None = None,
) -> Any:
    r"""``y = x W^T + bias + low up^T`` with W in 2 to 8 bits and x in 8, sums of integers.

    Each call quantises x as `quantize_activation` does, in cache, and multiplies codes: with
    AVX-512 VNNI 64 products an instruction. Few rows of x take the time of reading the codes of W.

    Parameters
    ----------
    x : array (.., k), float32, float16 or bfloat16
        NumPy or torch, any strides. float64 is computed by the reference.
    weight : flcore.quantization.QuantizedTensor
        W (n, k) of a scheme of kind symmetric, integer_zero or float_zero, on the device of `x`.
    bias : array (n,), optional
        Any floating dtype; rounded to float32.
    act_block : int, optional
        Values of a row of x that share a scale: a multiple of 16 that divides the weight's group or
        is divided by it; 0: the whole row. By default the weight's group; for one scale a row or a
        weight 128, or the whole row for codes of 8 bits.
    asymmetric : bool
        Quantise x to uint8 with a zero point. Needs the sums of the codes of W, which are computed
        once and kept for as long as the weight lives.
    low, up : arrays (.., rank) and (n, rank), optional
        An adapter, ``low = alpha / r x A^T`` and ``up = B``; rounded to float32.
    out : array (.., n), optional
        Where the result goes, of the dtype of `x`; untouched when the call raises.
    variant : {"reference", "cpu", "triton", "cuda"}, optional
        Which implementation runs; by default the best for the device.

    Returns
    -------
    array (.., n)
        Of the kind, dtype and device of `x`; `out` itself if it was given.

    Raises
    ------
    InvalidInputError
        Shapes that do not fit, an `act_block` that does not fit the weight's group, one of `low`
        and `up` alone, an `out` that cannot be written.
    DTypeError
        An argument that is no floating array of the library and device of `x`; a weight that is
        not quantized, or of a codebook or FP8, whose codes stand for no integers: `qmatmul` takes
        those.
    VariantUnavailableError
        The named variant cannot run here.

    Notes
    -----
    Blocks of k within which all scales are constant (of at most 32,768) are summed in int32,
    without error; the blocks of a row are added in order, each with one float32 fused
    multiply-add. The same bits at every instruction set, for every number of threads and however
    rows are put together into calls. Beside the exact product with the weight that the codes stand
    for, an element is off by ``sum_b s_b / 2 sum_k |w|`` at most, s_b the scale of x in a block,
    and the rounding of float32. A row with a value that is not finite is NaN in all outputs.

    References
    ----------
    Dettmers et al., "LLM.int8()", arXiv 2208.07339 (dynamic scales by row); the zero point of W by
    sums of x, and that of x by sums of W, are the identities of Jacob et al., "Quantization and
    Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
    equation 7.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import qmatmul_int8
    >>> from flcore.quantization import quantize
    >>> w = quantize(np.float32([[1, -2, 3, 0], [0.5, 4, -7, 1]]), "int8")
    >>> qmatmul_int8(np.float32([[1, 1, 1, 1]]), w).round(1)
    array([[ 2. , -1.5]], dtype=float32)
    """
    simple = bias is None and low is None and up is None and out is None and not asymmetric
    if variant is None and simple and getattr(weight, "scheme", None) and _is_integer(weight):
        found = plain(
            _native.core.qmatmul_int8_plain, x, weight, lambda w: _act_block(w, act_block)
        )
        if found is not None:
            return found
    call = prepare(
        x, weight, bias, low=low, up=up, out=out, act_block=0, asymmetric=bool(asymmetric)
    )
    if not _is_integer(weight):
        raise DTypeError(
            f"weight: expected codes that stand for integers ({', '.join(KINDS)}), got "
            f"{weight.scheme.kind!r}: use flcore.ops.qmatmul"
        )
    return run("qmatmul_int8", replace(call, act_block=_act_block(weight, act_block)), variant)


def _is_integer(weight: Any) -> bool:
    return bool(weight.scheme.kind in KINDS)


def _act_block(weight: Any, act_block: int | None) -> int:
    """Return the checked block of x, 0 for a whole row."""
    k, group = weight.shape[1], weight.group
    whole = group >= k
    if act_block is None:
        if not whole:
            return int(group)
        return 0 if weight.scheme.bits == 8 else 128
    try:
        block = operator.index(act_block)
    except TypeError:
        raise DTypeError(f"act_block: expected an integer, got {act_block!r}") from None
    if block < 0 or block % 16:
        raise InvalidInputError(f"act_block: expected a multiple of 16, or 0, got {block}")
    if block == 0 or block >= k:
        return 0
    if not whole and block % group and group % block:
        raise InvalidInputError(
            f"act_block: expected a divisor or a multiple of the group {group} of the weight, "
            f"got {block}"
        )
    return block


# ---- variants ------------------------------------------------------------------------------------

_code_sums: WeakKeyDictionary[Any, dict[int, np.ndarray]] = WeakKeyDictionary()


def _sums_of(weight: Any, fields: dict[str, int], act_block: int) -> np.ndarray:
    """Return the sums of codes (blocks of 16 rows, blocks of k, 16), computed once a weight."""
    kept = _code_sums.setdefault(weight, {})
    found = kept.get(act_block)
    if found is None:
        n, k = weight.shape
        count = _native.core.qmatmul_int8_blocks(fields, act_block)
        found = np.zeros((-(-n // 16), count, 16), np.int32)
        if found.size:
            _native.core.qmatmul_int8_code_sums(
                fields, act_block, _arrays.address(found), _native.threads_for(n * k)
            )
        kept[act_block] = found
    return found


def _cpu(call: QMatmulCall) -> None:
    """csrc/cpu/qmatmul_int8.isa.cpp."""
    fields = call.weight.kernel_args()
    sums = _sums_of(call.weight, fields, call.act_block) if call.asymmetric else None
    address = 0 if sums is None or not sums.size else _arrays.address(sums)
    _native.core.qmatmul_int8(fields, native(call), call.asymmetric, address)


_variants.add("qmatmul_int8", "cpu", _variants.lazy(__name__, "_cpu"), _variants.cpu_only)
_variants.add(
    "qmatmul_int8", "reference", _variants.lazy("flcore.reference.qmatmul_int8", "qmatmul_int8")
)
_variants.add(
    "qmatmul_int8",
    "cuda",
    _variants.lazy("flcore.ops._qmatmul_cuda", "qmatmul_int8"),
    _variants.needs_cuda,
)
_variants.add(
    "qmatmul_int8",
    "triton",
    _variants.lazy("flcore.ops._qmatmul_int8_triton", "qmatmul_int8"),
    _variants.needs_triton,
)
