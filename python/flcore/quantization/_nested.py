"""Formats with scales of scales: NVFP4, and Q4_K of ggml."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore import _arrays
from flcore.errors import CheckpointError, InvalidInputError, NonFiniteError
from flcore.quantization._load_checks import assemble, expect_shape, part, positive
from flcore.quantization._scheme import Scheme
from flcore.quantization._tensor import QuantizedTensor
from flcore.reference import nvfp4
from flcore.reference import weight_quant as wq

__all__ = ["from_ggml_q4_k", "from_nvfp4", "quantize_nvfp4"]

NVFP4 = Scheme(bits=4, group=16, kind="codebook", codebook="e2m1", scale_dtype="float32")
Q4_K = Scheme(bits=4, group=32, kind="float_zero", scale_dtype="float32")
SUPERBLOCK, SUPERBLOCK_BYTES = 256, 144


def quantize_nvfp4(w: Any, *, two_levels: bool = True) -> QuantizedTensor:
    """Quantise a weight to NVFP4, in NumPy.

    Parameters
    ----------
    w : array (n, k)
        NumPy or torch, finite floats.
    two_levels : bool
        Use a scale for the whole weight, so that the scales of blocks fill the range of e4m3.

    Returns
    -------
    QuantizedTensor
        Kind codebook e2m1, groups of 16; scales are products in float32, 6 bits a weight here
        where the format itself has 4.5.

    Raises
    ------
    NonFiniteError
        `w` holds a NaN or an infinity.
    InvalidInputError, DTypeError
        `w` is not a matrix of floats.
    """
    if _arrays.is_array(w) and w.ndim != 2:
        raise InvalidInputError(f"w: expected a matrix (n, k), got shape {tuple(w.shape)}")
    source = _arrays.view(w, "w").array
    values = _arrays.to_float64(source).reshape(tuple(w.shape)).astype(np.float32)
    if not np.isfinite(values).all():
        raise NonFiniteError("w: expected finite values, got a NaN or an infinity")
    q, scale_codes, t = nvfp4.quantize(values, two_levels)
    return assemble(q, nvfp4.block_scales(scale_codes, t), None, NVFP4, w)


def from_nvfp4(packed: Any, scales: Any, tensor_scale: float = 1.0, *, k: int) -> QuantizedTensor:
    """Take a weight from codes and e4m3 scales of NVFP4.

    Parameters
    ----------
    packed : (n, ceil(k / 2)) uint8
        e2m1 codes, even k in the low nibble.
    scales : (n, ceil(k / 16)) uint8 or torch.float8_e4m3fn
        Scale of each block.
    tensor_scale : float
        What all scales are multiplied by.
    k : int
        Inputs of the weight.

    Returns
    -------
    QuantizedTensor
        Kind codebook e2m1, groups of 16, float32 scales.

    Raises
    ------
    CheckpointError
        Shapes that contradict one another, a scale that is not finite.
    DTypeError
        A part of another dtype.
    """
    k = positive(k, "k")
    codes = part(packed, "packed", ("uint8",), 2)
    expect_shape(codes, "packed", (len(codes), -(-k // 2)), f"two of {k} codes in a byte")
    if _arrays.is_torch(scales) and _arrays.dtype_name(scales) == "float8_e4m3fn":
        import torch

        scales = scales.view(torch.uint8)
    found = part(scales, "scales", ("uint8",), 2)
    expect_shape(found, "scales", (len(codes), wq.groups(k, 16)), f"blocks of 16 of {k} inputs")
    if found.size and int((found & 0x7F).max()) > 0x7E:
        raise CheckpointError("scales: a byte that is no finite e4m3 number")
    t = float(np.float32(tensor_scale))
    if not np.isfinite(t):
        raise CheckpointError(f"tensor_scale: expected a finite number, got {tensor_scale!r}")
    return assemble(wq.unpack_rows(codes, k, 4), nvfp4.block_scales(found, t), None, NVFP4, packed)


def from_ggml_q4_k(blocks: Any, shape: tuple[int, int]) -> QuantizedTensor:
    """Take a weight from ggml's Q4_K: 144 bytes for 256 weights.

    A superblock is d and dmin (float16), 12 bytes with scales sc and minima m of 6 bits for eight
    groups of 32, and 128 bytes of codes, byte l of 32 with code l of an even group in the low and
    of the next group in the high nibble: ``w = (d sc) q - dmin m``.

    Parameters
    ----------
    blocks : uint8, n k / 256 times 144 bytes
        In any shape.
    shape : (int, int)
        (n, k); k a multiple of 256.

    Returns
    -------
    QuantizedTensor
        Kind float_zero with float32 scales: ``(q - 8) S + zero`` with ``S = d sc`` and
        ``zero = 8 S - dmin m``, rounded once to float32.

    Raises
    ------
    CheckpointError
        Another number of bytes, scales that are not finite.
    DTypeError, InvalidInputError
        Not bytes; a shape that cannot be used.
    """
    n, k = (positive(s, "shape") for s in shape)
    if k % SUPERBLOCK:
        raise InvalidInputError(f"shape: expected a multiple of 256 inputs, got {k}")
    flat = np.ascontiguousarray(part(blocks, "blocks", ("uint8",))).reshape(-1)
    count = n * k // SUPERBLOCK
    expect_shape(flat, "blocks", (count * SUPERBLOCK_BYTES,), f"144 bytes for 256 of {n} x {k}")
    b = flat.reshape(count, SUPERBLOCK_BYTES)
    d, dmin = b[:, :4].copy().view("<f2").astype(np.float64).T[:, :, None]
    p = b[:, 4:16]
    low, high = p[:, :4], p[:, 4:8]
    sc = np.concatenate([low & 63, (p[:, 8:] & 15) | (low >> 6 << 4)], axis=1)
    m = np.concatenate([high & 63, (p[:, 8:] >> 4) | (high >> 6 << 4)], axis=1)
    nibbles = b[:, 16:].reshape(count, 4, 1, 32)
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(n, k)
    with np.errstate(invalid="ignore"):  # what is not finite is refused below
        s = d * sc
        zeros = 8 * s - dmin * m
    s, zeros = (x.astype(np.float32).reshape(n, -1) for x in (s, zeros))
    return assemble(q, s, zeros, Q4_K, blocks)
