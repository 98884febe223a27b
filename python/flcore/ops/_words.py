"""What the ops on fixed-point words share: views of uint32 arrays, masks, numbers in a range."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flcore import _arrays
from flcore._arrays import View
from flcore.errors import DTypeError, InvalidInputError

__all__ = [
    "KEY_BYTES",
    "NONCE_BYTES",
    "STREAM_WORDS",
    "Mask",
    "check_masks",
    "check_position",
    "copy_words",
    "empty_like_words",
    "finite",
    "overlap",
    "part",
    "whole",
    "words_view",
]

KEY_BYTES, NONCE_BYTES = 32, 12
STREAM_WORDS = 1 << 36  # MASK_LENGTH in csrc/api.h


class Mask(NamedTuple):
    """One keystream that is added to words, or subtracted.

    Attributes
    ----------
    key : 32 bytes
        Of ChaCha20. A secret; use it in one round only.
    sign : {1, -1}
        Added or subtracted.
    nonce : 12 bytes
        Separates streams of one key.
    """

    key: bytes
    sign: int = 1
    nonce: bytes = bytes(NONCE_BYTES)

    def __repr__(self) -> str:  # a key in a log or a traceback is a key given away
        return f"Mask(key=..., sign={self.sign!r}, nonce={self.nonce!r})"


# ---- numbers -----------------------------------------------------------------------------------


def whole(label: str, value: Any, low: int, high: int) -> int:
    """Return `value` as an int in ``low .. high``.

    Raises
    ------
    DTypeError
        Not an integer.
    InvalidInputError
        Outside the range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise DTypeError(f"{label}: expected an integer, got {type(value).__name__}") from None
    if not low <= number <= high:
        raise InvalidInputError(f"{label}: expected {low} <= {label} <= {high}, got {number}")
    return number


def finite(label: str, value: Any, *, low: float = -math.inf) -> float:
    """Return `value` as a finite float above `low`.

    Raises
    ------
    DTypeError
        Not a number.
    InvalidInputError
        NaN, infinite, or not above `low`.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DTypeError(f"{label}: expected a number, got {type(value).__name__}") from None
    if not (math.isfinite(number) and number > low):
        above = "" if low == -math.inf else f" above {low:g}"
        raise InvalidInputError(f"{label}: expected a finite number{above}, got {value!r}")
    return number


# ---- masks -------------------------------------------------------------------------------------


def check_masks(masks: Sequence[Any]) -> list[Mask]:
    """Return masks whose key, sign and nonce can be used; messages do not show keys."""
    checked = []
    for i, mask in enumerate(masks):
        if not isinstance(mask, tuple) or len(mask) != 3:
            raise DTypeError(
                f"masks[{i}]: expected a Mask(key, sign, nonce), got {type(mask).__name__}"
            )
        key, sign, nonce = mask
        for label, value, length in (("key", key, KEY_BYTES), ("nonce", nonce, NONCE_BYTES)):
            if not isinstance(value, bytes | bytearray | memoryview):
                raise DTypeError(
                    f"masks[{i}].{label}: expected {length} bytes, got {type(value).__name__}"
                )
            if len(bytes(value)) != length:
                raise InvalidInputError(
                    f"masks[{i}].{label}: expected {length} bytes, got {len(bytes(value))}"
                )
        if sign not in (1, -1):
            raise InvalidInputError(f"masks[{i}].sign: expected 1 or -1, got {sign!r}")
        checked.append(Mask(bytes(key), int(sign), bytes(nonce)))
    return checked


def check_position(position: Any, numel: int) -> int:
    """Return `position` if a message that starts there ends within the streams."""
    position = whole("position", position, 0, STREAM_WORDS)
    if position + numel > STREAM_WORDS:
        raise InvalidInputError(
            f"position: a mask stream has 2^36 words, expected position + numel within it, "
            f"got {position} + {numel}"
        )
    return position


# ---- views of uint32 arrays --------------------------------------------------------------------


def words_view(x: Any, name: str, *, writable: bool = False, like: View | None = None) -> View:
    """View `x` as words: for reading (one copy if it is not contiguous), or for writing in place.

    Raises
    ------
    DTypeError
        Not an array of uint32, or of another device than `like`.
    InvalidInputError
        Of another length than `like`; or to be written and read-only or not contiguous.
    """
    if not _arrays.is_array(x) or _arrays.dtype_name(x) != "uint32":
        got = _arrays.dtype_name(x) if _arrays.is_array(x) else type(x).__name__
        raise DTypeError(f"{name}: expected an array of uint32, got {got}")
    if like is not None and _arrays.device_of(x) != like.device:
        raise DTypeError(f"{name}: expected words on {like.device}, got {_arrays.device_of(x)}")
    if like is not None and _arrays.numel(x) != like.numel:
        raise InvalidInputError(f"{name}: expected {like.numel} words, got {_arrays.numel(x)}")
    if isinstance(x, np.ndarray):
        whole_array = x.flags.c_contiguous and x.dtype.isnative
        if writable and not x.flags.writeable:
            raise InvalidInputError(f"{name}: the array is read-only; pass one that can be written")
        if not whole_array and not writable:
            x = np.ascontiguousarray(x, dtype=np.uint32)
    else:
        x = x.detach()
        whole_array = x.is_contiguous()
        if not whole_array and not writable:
            x = x.contiguous()
    if writable and not whole_array:
        raise InvalidInputError(f"{name}: expected a contiguous array of native byte order")
    numel = _arrays.numel(x)
    return View(_arrays.address(x) if numel else 0, numel, "uint32", _arrays.device_of(x), x)


def empty_like_words(numel: int, dtype: str, like: View) -> Any:
    """Return an uninitialised flat array of the library and device of `like`."""
    if isinstance(like.array, np.ndarray):
        if dtype == "bfloat16":
            raise DTypeError("dtype: NumPy has no bfloat16; pass out= with an array that has it")
        return np.empty(numel, dtype)
    torch = sys.modules["torch"]
    return torch.empty(numel, dtype=getattr(torch, dtype), device=like.array.device)


def copy_words(v: View) -> View:
    """Copy words into memory of their own."""
    x = v.array.copy() if isinstance(v.array, np.ndarray) else v.array.clone()
    return v._replace(ptr=_arrays.address(x) if v.numel else 0, array=x)


def overlap(a: View, b: View) -> bool:
    """Whether two views of words share memory."""
    return a.ptr < b.ptr + 4 * b.numel and b.ptr < a.ptr + 4 * a.numel


def part(v: View, start: int, numel: int) -> View:
    """Words ``start .. start + numel - 1`` of a view."""
    array = v.array.reshape(-1)[start : start + numel]
    return View(v.ptr + 4 * start if numel else 0, numel, "uint32", v.device, array)
