"""Loaders of layouts in blocks of bytes: ONNX Runtime, bitsandbytes, ggml. Nothing is rounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore.errors import CheckpointError, DTypeError, InvalidInputError
from flcore.quantization._load_checks import (
    assemble,
    expect_shape,
    part,
    positive,
    scale_dtype,
)
from flcore.quantization._scheme import Scheme
from flcore.quantization._tensor import QuantizedTensor
from flcore.reference import weight_quant as wq

__all__ = ["from_bitsandbytes_nf4", "from_ggml_q4_0", "from_onnx_matmul_nbits"]


def from_onnx_matmul_nbits(
    codes: Any,
    scales: Any,
    zero_points: Any = None,
    *,
    k: int,
    bits: int = 4,
    block_size: int,
) -> QuantizedTensor:
    """Take a weight from the inputs of ONNX Runtime's MatMulNBits.

    Parameters
    ----------
    codes : (n, G, block_size bits / 8) uint8
        Input B; the lowest bits of a byte are the first k.
    scales : (n, G) or (n G,) float32, float16 or bfloat16
    zero_points : uint8, optional
        (n, ceil(G bits / 8)) or flat, packed along the groups of a row, lowest bits first; or of
        the dtype of the scales, (n, G) or flat, with whole numbers. Default: ``2^(bits - 1)``.
    k : int
        Attribute K: inputs of the weight. The last block may be longer than what is left of them.
    bits : {2, 4, 8}
    block_size : int
        Attribute block_size, a multiple of 16.

    Returns
    -------
    QuantizedTensor
        (n, k), kind integer_zero, or symmetric without zero points.

    Raises
    ------
    CheckpointError
        Shapes that contradict one another, scales that are not finite, zero points that are not
        codes.
    DTypeError
        A part of another dtype.
    InvalidInputError
        `k`, `bits` or `block_size` that cannot be used.
    """
    if bits not in (2, 4, 8):
        raise InvalidInputError(f"bits: expected 2, 4 or 8, got {bits!r}")
    k, block_size = positive(k, "k"), positive(block_size, "block_size")
    if block_size % 16:
        raise InvalidInputError(f"block_size: expected a multiple of 16, got {block_size}")
    blocks = part(codes, "codes", ("uint8",), 3)
    n, count = len(blocks), -(-k // block_size)
    why = f"blocks of {block_size} codes of {bits} bits for {k} inputs"
    expect_shape(blocks, "codes", (n, count, block_size * bits // 8), why)
    s = part(scales, "scales", ("float32", "float16", "bfloat16"))
    s = _flat(s, "scales", (n, count))
    zeros = None if zero_points is None else _zero_points(zero_points, n, count, bits, s)
    q = wq.unpack_rows(blocks.reshape(n, -1), count * block_size, bits)[:, :k]
    scheme = Scheme(
        bits=bits,
        group=-1 if block_size >= k else block_size,
        kind="symmetric" if zeros is None else "integer_zero",
        scale_dtype=scale_dtype(s),
    )
    return assemble(q, s, zeros, scheme, codes)


def _flat(x: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array that may have been flattened in its shape."""
    if x.ndim == 1 and x.size == math.prod(shape):
        return x.reshape(shape)
    expect_shape(x, name, shape, "rows and blocks of codes, or flat")
    return x


def _zero_points(x: Any, n: int, count: int, bits: int, scales: np.ndarray) -> np.ndarray:
    found = part(x, "zero_points", ("uint8", scale_dtype(scales)))
    if found.dtype == np.uint8:
        packed = _flat(found, "zero_points", (n, -(-count * bits // 8)))
        return wq.unpack_rows(packed, count, bits)
    if found.dtype == np.uint16:
        raise DTypeError("zero_points: expected uint8, float16 or float32, got bfloat16")
    values = _flat(found, "zero_points", (n, count))
    zeros = np.clip(np.nan_to_num(values), 0, 2**bits - 1).astype(np.uint8)
    if (zeros != values).any():
        bad = values[zeros != values][0]
        raise CheckpointError(
            f"zero_points: expected whole numbers of 0 .. {2**bits - 1}, got {bad}"
        )
    return zeros


def from_bitsandbytes_nf4(
    packed: Any,
    absmax: Any,
    shape: tuple[int, int],
    *,
    block_size: int = 64,
    code: Any = "nf4",
    nested_absmax: Any = None,
    nested_code: Any = None,
    nested_offset: float = 0.0,
    nested_block_size: int = 256,
) -> QuantizedTensor:
    """Take a weight from the 4-bit layout of bitsandbytes.

    Parameters
    ----------
    packed : (n k / 2,) or (n k / 2, 1) uint8
        Codes of the flattened weight, the HIGH nibble first.
    absmax : (n k / block_size,) float32, or uint8 with the `nested_*` arguments
        Scale of each block of `block_size` values of the flattened weight.
    shape : (int, int)
        (n, k).
    block_size : int
        64 in most files. Blocks that cross rows are taken apart: with ``d = gcd(block_size, k)``
        the result has groups of d, for which d must be a multiple of 16.
    code : {"nf4", "fp4"} or (16,) floats
        The levels ("quant_map").
    nested_absmax, nested_code : float32 arrays, optional
        Double quantisation: ``absmax = nested_code[absmax] nested_absmax[block // 256] + offset``.
    nested_offset : float
    nested_block_size : int

    Returns
    -------
    QuantizedTensor
        (n, k), kind codebook with float32 scales.

    Raises
    ------
    CheckpointError
        Lengths that contradict the shape, or scales that are not finite.
    DTypeError
        A part of another dtype.
    InvalidInputError
        A shape or block size that cannot be used.

    References
    ----------
    Dettmers et al., "QLoRA", NeurIPS 2023, arXiv 2305.14314.
    """
    n, k = _shape(shape)
    block_size = positive(block_size, "block_size")
    flat = part(packed, "packed", ("uint8",)).reshape(-1)
    if n * k % 2:
        raise InvalidInputError(f"shape: expected an even number of values, got {n} x {k}")
    expect_shape(flat, "packed", (n * k // 2,), f"two of {n} x {k} values in a byte")
    scales = part(absmax, "absmax", ("float32", "uint8")).reshape(-1)
    blocks = -(-n * k // block_size)
    expect_shape(scales, "absmax", (blocks,), f"blocks of {block_size} of {n} x {k} values")
    if scales.dtype == np.uint8:
        scales = _nested(scales, nested_absmax, nested_code, nested_offset, nested_block_size)
    group = math.gcd(block_size, k)
    if group % 16 and group != k:
        raise InvalidInputError(
            f"shape: rows of {k} values and blocks of {block_size} share no groups of a multiple "
            "of 16"
        )
    # the block of the first value of every group; several rows may lie in one
    first = np.arange(n * k // group) * group // block_size
    q = np.empty((n * k // 2, 2), np.uint8)
    q[:, 0], q[:, 1] = flat >> 4, flat & 15
    if not isinstance(code, str):
        code = tuple(part(code, "code", ("float32",)).reshape(-1).tolist())
    scheme = Scheme(
        bits=4,
        group=-1 if group == k else group,
        kind="codebook",
        codebook=code,
        scale_dtype="float32",
    )
    return assemble(q.reshape(n, k), scales[first].reshape(n, -1), None, scheme, packed)


def _shape(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2:
        raise InvalidInputError(f"shape: expected (n, k), got {shape!r}")
    return positive(shape[0], "shape[0]"), positive(shape[1], "shape[1]")


def _nested(
    codes: np.ndarray, absmax: Any, code: Any, offset: float, block_size: int
) -> np.ndarray:
    """Scales out of their own 8-bit codes, in float32."""
    if absmax is None or code is None:
        raise InvalidInputError(
            "absmax: uint8 scales are codes themselves; pass nested_absmax and nested_code"
        )
    block_size = positive(block_size, "nested_block_size")
    outer = part(absmax, "nested_absmax", ("float32",)).reshape(-1)
    levels = part(code, "nested_code", ("float32",)).reshape(-1)
    expect_shape(levels, "nested_code", (256,), "one for each byte")
    blocks = -(-len(codes) // block_size)
    expect_shape(outer, "nested_absmax", (blocks,), f"blocks of {block_size} scales")
    which = np.arange(len(codes)) // block_size
    return levels[codes] * outer[which] + np.float32(offset)


def from_ggml_q4_0(blocks: Any, shape: tuple[int, int]) -> QuantizedTensor:
    """Take a weight from ggml's Q4_0 blocks.

    Parameters
    ----------
    blocks : uint8, n k / 32 blocks of 18 bytes in any shape
        A float16 scale d, then byte j holds value j in the low and j + 16 in the high nibble.
    shape : (int, int)
        (n, k), k a multiple of 32.

    Returns
    -------
    QuantizedTensor
        (n, k), kind symmetric in groups of 32 with float16 scales: ``(q - 8) d``.

    Raises
    ------
    CheckpointError
        Another number of bytes than the shape asks for, or scales that are not finite.
    DTypeError
        `blocks` is not of bytes.
    InvalidInputError
        A shape whose rows are no whole blocks.
    """
    n, k = _shape(shape)
    if k % 32:
        raise InvalidInputError(f"shape: expected rows of a multiple of 32 values, got {k}")
    flat = part(blocks, "blocks", ("uint8",)).reshape(-1)
    expect_shape(flat, "blocks", (n * k // 32 * 18,), f"18 bytes for 32 of {n} x {k} values")
    table = flat.reshape(n, k // 32, 18)
    scales = np.ascontiguousarray(table[..., :2]).view("<f2")[..., 0].astype(np.float16)
    nibbles = table[..., 2:]
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).reshape(n, k)
    scheme = Scheme(bits=4, group=-1 if k == 32 else 32, kind="symmetric", rule="q4_0")
    return assemble(q, scales, None, scheme, blocks)
