"""What the loaders of foreign layouts share: parts as NumPy arrays, sizes, fields of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays
from flcore import _weight_arrays as parts
from flcore.errors import CheckpointError, DTypeError, InvalidInputError
from flcore.quantization._scheme import Scheme
from flcore.quantization._tensor import QuantizedTensor
from flcore.reference import weight_quant as wq

__all__ = [
    "assemble",
    "expect_shape",
    "group_count",
    "part",
    "positive",
    "scale_dtype",
    "split_words",
]

INTEGERS = ("int32", "uint32")
SCALES = ("float16", "bfloat16", "float32")


def part(x: Any, name: str, dtypes: Sequence[str], ndim: int | None = None) -> np.ndarray:
    """Return a NumPy or torch array of one of `dtypes` as a NumPy array (bfloat16 as uint16).

    Raises
    ------
    DTypeError
        No array, or of another dtype.
    CheckpointError
        Of another number of dimensions than `ndim`.
    """
    if not _arrays.is_array(x):
        raise DTypeError(
            f"{name}: expected a NumPy array or a torch tensor, got {type(x).__name__}"
        )
    if not any(parts.part_dtype(x, dtype) for dtype in dtypes):
        raise DTypeError(f"{name}: expected {' or '.join(dtypes)}, got {_arrays.dtype_name(x)}")
    found = parts.to_numpy(x)
    if ndim is not None and found.ndim != ndim:
        raise CheckpointError(f"{name}: expected {ndim} dimensions, got the shape {found.shape}")
    return found.astype(found.dtype.newbyteorder("="), copy=False)


def scale_dtype(scales: np.ndarray) -> str:
    """Storage type of an array of scales that `part` returned."""
    return "bfloat16" if scales.dtype == np.uint16 else scales.dtype.name


def expect_shape(x: np.ndarray, name: str, shape: tuple[int, ...], why: str) -> None:
    """Raise CheckpointError unless `x` has this shape; `why` says where it comes from."""
    if x.shape != shape:
        raise CheckpointError(f"{name}: expected the shape {shape} ({why}), got {x.shape}")


def positive(value: Any, name: str) -> int:
    """Return a positive integer.

    Raises
    ------
    InvalidInputError
        Anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InvalidInputError(f"{name}: expected a positive integer, got {value!r}")
    return int(value)


def group_count(k: int, count: int, group: int | None) -> int:
    """Return the size of the groups of a row of `k`, of which there are `count`.

    Raises
    ------
    InvalidInputError
        A given `group` that is not positive.
    CheckpointError
        Sizes that contradict one another, or a size that cannot be told.
    """
    if group in (None, -1):
        if count < 1 or k % count:
            raise CheckpointError(
                f"scales: {count} groups do not divide the {k} inputs of the weight; pass the "
                "group size if the last group is short"
            )
        return k // count
    group = positive(group, "group_size")
    if -(-k // group) != count:
        raise CheckpointError(
            f"scales: expected {-(-k // group)} groups of {group} in the {k} inputs of the weight, "
            f"got {count}"
        )
    return group


def split_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the fields of `bits` bits of 32-bit words, the lowest first.

    Parameters
    ----------
    words : (..., w) int32 or uint32
        Fields follow one another through all w words, also across their borders.
    bits : int

    Returns
    -------
    (..., 32 w // bits) uint8
    """
    stream = np.ascontiguousarray(words).astype(f"<{words.dtype.kind}4").view(np.uint8)
    if bits == 3:
        ones = np.unpackbits(stream, axis=-1, bitorder="little")
        count = ones.shape[-1] // bits
        fields = ones[..., : count * bits].reshape(*ones.shape[:-1], count, bits)
        return fields[..., 0] | (fields[..., 1] << 1) | (fields[..., 2] << 2)
    return wq.unpack_rows(stream, stream.shape[-1] * 8 // bits, bits)


def assemble(
    q: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, scheme: Scheme, like: Any
) -> QuantizedTensor:
    """Return the weight of codes (n, k), scales and zeros (n, G), of the kind and device of `like`.

    Raises
    ------
    CheckpointError
        A scale that is not finite.
    """
    try:
        tensor = QuantizedTensor.from_parts(
            q.shape,  # type: ignore[arg-type]
            scheme,
            wq.pack_rows(np.ascontiguousarray(q), scheme.bits),
            np.ascontiguousarray(scales),
            None if zeros is None else np.ascontiguousarray(zeros),
        )
    except InvalidInputError as error:
        raise CheckpointError(str(error)) from None
    return tensor.to(like.device) if _arrays.is_torch(like) else tensor
