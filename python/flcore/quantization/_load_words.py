"""Loaders of layouts in 32-bit words: AutoAWQ (GEMM) and GPTQ. Codes move, nothing is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flcore.errors import CheckpointError, InvalidInputError
from flcore.quantization._load_checks import (
    INTEGERS,
    SCALES,
    assemble,
    expect_shape,
    group_count,
    part,
    scale_dtype,
    split_words,
)
from flcore.quantization._scheme import Scheme
from flcore.quantization._tensor import QuantizedTensor

__all__ = ["from_autoawq", "from_gptq", "gptq_order", "gptq_zero_offset"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column 8 c + AWQ_ORDER[i] is nibble i of word c


def from_autoawq(
    qweight: Any, qzeros: Any, scales: Any, *, group_size: int | None = None
) -> QuantizedTensor:
    """Take a weight from AutoAWQ's GEMM layout (4 bits, integer zeros).

    Parameters
    ----------
    qweight : (k, n / 8) int32
        Nibble i of word c is column ``8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]``.
    qzeros : (G, n / 8) int32
        Zeros in the same order.
    scales : (G, n) float16, bfloat16 or float32
    group_size : int, optional
        Inputs that share a scale; by default k / G.

    Returns
    -------
    QuantizedTensor
        (n, k), kind integer_zero, of the kind and on the device of `qweight`; dequantised it is
        ``(q - z) s`` to the bit.

    Raises
    ------
    CheckpointError
        Shapes that contradict one another, or scales that are not finite.
    DTypeError
        A part of another dtype.
    InvalidInputError
        A group size that is not a multiple of 16.

    References
    ----------
    Lin et al., "AWQ", MLSys 2024, arXiv 2306.00978; layout of AutoAWQ's WQLinear_GEMM.
    """
    words = part(qweight, "qweight", INTEGERS, 2)
    zero_words = part(qzeros, "qzeros", INTEGERS, 2)
    s = part(scales, "scales", SCALES, 2)
    k, n = words.shape[0], words.shape[1] * 8
    if s.shape[1] != n:
        raise CheckpointError(
            f"scales: expected {n} columns, 8 a word of qweight {words.shape}, got {s.shape}"
        )
    expect_shape(zero_words, "qzeros", (len(s), n // 8), "8 of the columns of scales in a word")
    group = group_count(k, len(s), group_size)
    scheme = _scheme(4, k, group, s)
    return assemble(_awq(words).T, s.T, _awq(zero_words).T, scheme, qweight)


def _awq(words: np.ndarray) -> np.ndarray:
    nibbles = split_words(words, 4).reshape(*words.shape, 8)
    return nibbles[..., np.argsort(AWQ_ORDER)].reshape(len(words), -1)


def from_gptq(
    qweight: Any,
    qzeros: Any,
    scales: Any,
    *,
    bits: int = 4,
    zero_offset: int | None = None,
    config: Mapping[str, Any] | None = None,
    group_size: int | None = None,
    g_idx: Any = None,
    order: Any = None,
) -> QuantizedTensor:
    """Take a weight from GPTQ's layout.

    Parameters
    ----------
    qweight : (k bits / 32, n) int32
        Codes of a column one after another from the lowest bit, through the words (a code of 3
        bits may begin in one and end in the next).
    qzeros : (G, n bits / 32) int32
        Zeros less `zero_offset`, packed along n in the same way.
    scales : (G, n) float16, bfloat16 or float32
    bits : {2, 3, 4, 8}
    zero_offset : {0, 1}, optional
        What the writer subtracted from the zeros: 1 in the older format ("gptq", v1), 0 in
        "gptq_v2". Files do not show it by themselves, so it has no default.
    config : mapping, optional
        The quantization config of the checkpoint, whose "checkpoint_format" tells `zero_offset`.
    group_size : int, optional
        Inputs that share a scale; by default k / G.
    g_idx : (k,) integers, optional
        Group of every input. Where groups are scattered (act-order), `order` is needed.
    order : (k,) integers, optional
        Result of `gptq_order`: the columns are taken in this order, and the inputs of the product
        must be too. `flcore.nn.QuantLinear.from_gptq` does both.

    Returns
    -------
    QuantizedTensor
        (n, k), kind integer_zero, of the kind and on the device of `qweight`.

    Raises
    ------
    CheckpointError
        Shapes that contradict one another, scales that are not finite, or a stored zero that
        `zero_offset` would lift beyond the codes.
    DTypeError
        A part of another dtype.
    InvalidInputError
        `bits`, `zero_offset`, group size or order that cannot be used, or no word about the offset.

    References
    ----------
    Frantar et al., "GPTQ", ICLR 2023, arXiv 2210.17323.
    """
    if bits not in (2, 3, 4, 8):
        raise InvalidInputError(f"bits: expected 2, 3, 4 or 8, got {bits!r}")
    offset = _offset(zero_offset, config)
    words = part(qweight, "qweight", INTEGERS, 2)
    zero_words = part(qzeros, "qzeros", INTEGERS, 2)
    s = part(scales, "scales", SCALES, 2)
    n = words.shape[1]
    if words.shape[0] * 32 % bits or n * bits % 32:
        raise CheckpointError(
            f"qweight: {words.shape} words do not hold whole columns of {bits}-bit codes"
        )
    k = words.shape[0] * 32 // bits
    expect_shape(s, "scales", (s.shape[0], n), "the columns of qweight")
    expect_shape(zero_words, "qzeros", (len(s), n * bits // 32), f"{bits} bits for each scale")
    group = group_count(k, len(s), group_size)
    q = split_words(words.T, bits)
    zeros = split_words(zero_words, bits)
    if offset and (zeros == 2**bits - 1).any():
        raise CheckpointError(
            f"qzeros: a stored zero of {2**bits - 1} stands for {2**bits} with zero_offset=1, "
            "which no code reaches; the file may be of the format without an offset (zero_offset=0)"
        )
    wanted = None if g_idx is None else gptq_order(g_idx, group)
    if order is not None:
        taken = part(order, "order", ("int64", "int32"), 1)
        if not np.array_equal(np.sort(taken), np.arange(k)):
            raise InvalidInputError(f"order: expected every input of 0 .. {k - 1} once")
        if wanted is not None and not np.array_equal(wanted, taken):
            raise InvalidInputError("order: expected what gptq_order gives for g_idx")
        q = q[:, taken]
    elif wanted is not None:
        expect_shape(wanted, "g_idx", (k,), "the inputs of qweight")
        if not np.array_equal(wanted, np.arange(k)):
            raise InvalidInputError(
                "g_idx: inputs are not in the order of their groups (act-order); pass "
                "order=gptq_order(g_idx) and give the product its inputs in that order"
            )
    scheme = _scheme(bits, k, group, s)
    return assemble(q, s.T, (zeros + np.uint8(offset)).T, scheme, qweight)


def gptq_order(g_idx: Any, group_size: int | None = None) -> np.ndarray:
    """Return the inputs in the order of their groups, as `from_gptq` takes it.

    Parameters
    ----------
    g_idx : (k,) integers
        Group of every input.
    group_size : int, optional
        Members of a group, to be checked; the last group may be short.

    Returns
    -------
    (k,) int64
        Inputs of group 0, then of group 1, .., each in increasing order.

    Raises
    ------
    CheckpointError
        A group that lacks members or has too many.
    DTypeError
        No integers.
    """
    groups = part(g_idx, "g_idx", ("int32", "int64"), 1).astype(np.int64)
    order = np.argsort(groups, kind="stable")
    if group_size is None:
        group_size = int((groups == 0).sum()) or 1
    if not np.array_equal(groups[order], np.arange(len(groups)) // group_size):
        raise CheckpointError(
            f"g_idx: expected {group_size} inputs in each group, and fewer in the last at most"
        )
    return order


def gptq_zero_offset(config: Mapping[str, Any]) -> int:
    """Return what a checkpoint's config says about its zeros: 1 for "gptq", 0 for "gptq_v2".

    Raises
    ------
    CheckpointError
        There is no "checkpoint_format", or an unknown one.
    """
    found = config.get("checkpoint_format")
    if found not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"config: expected checkpoint_format 'gptq' or 'gptq_v2', got {found!r}; pass "
            "zero_offset=1 for files of the older format, 0 for the newer"
        )
    return 1 if found == "gptq" else 0


def _offset(zero_offset: int | None, config: Mapping[str, Any] | None) -> int:
    told = None if config is None else gptq_zero_offset(config)
    if zero_offset is None and told is None:
        raise InvalidInputError(
            "zero_offset: expected 1 (older format, zeros stored less one) or 0, or a config with "
            "a checkpoint_format; the words of a file do not tell"
        )
    if zero_offset is not None and (isinstance(zero_offset, bool) or zero_offset not in (0, 1)):
        raise InvalidInputError(f"zero_offset: expected 0 or 1, got {zero_offset!r}")
    if zero_offset is not None and told is not None and zero_offset != told:
        raise InvalidInputError(f"zero_offset: got {zero_offset}, and the config says {told}")
    return int(told if zero_offset is None else zero_offset)  # type: ignore[arg-type]


def _scheme(bits: int, k: int, group: int, scales: np.ndarray) -> Scheme:
    whole = group >= k
    if not whole and group % 16:
        raise InvalidInputError(f"group_size: expected a multiple of 16 or the row, got {group}")
    return Scheme(
        bits=bits,
        group=-1 if whole else group,
        kind="integer_zero",
        scale_dtype=scale_dtype(scales),
    )
