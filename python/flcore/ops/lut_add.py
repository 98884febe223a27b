"""Codes looked up in a table and added as integers, without decoding: validation and variants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _variants
from flcore.errors import DTypeError, InvalidInputError
from flcore.reference import lut_add as reference

__all__ = ["LANES", "lut_add", "lut_lanes"]

LANES = {"uint8": 255, "uint16": 65_535, "uint32": 4_294_967_295}
"""Integer types that sums can have, and the largest sum of each."""
LARGEST = 255  # of a table's values


def lut_lanes(most: int, lanes: str = "auto") -> str:
    """Return the type of sums that reach up to `most`: the narrowest, or `lanes` if it is enough.

    Raises
    ------
    InvalidInputError
        No type is wide enough, or not the one that was asked for.
    """
    if lanes != "auto" and lanes not in LANES:
        raise InvalidInputError(f"lanes: expected auto, {', '.join(LANES)}, got {lanes!r}")
    for name, largest in LANES.items():
        if most <= largest and lanes in ("auto", name):
            return name
    raise InvalidInputError(
        f"lanes: sums can reach {most}, which does not fit in {lanes}; take wider lanes, fewer "
        "packets or smaller weights"
    )


def lut_add(
    packets: Sequence[np.ndarray],
    table: Any,
    *,
    bits: int,
    codes: int,
    weights: Sequence[int] | None = None,
    lanes: str = "auto",
    variant: str | None = None,
) -> np.ndarray:
    """Add ``weights[i] * table[code j of packet i]`` over packets, for every j.

    Integers only: the same numbers in any order. Reads ``n bits / 8`` bytes a code and writes the
    sums once; a shuffle looks up 16 or 32 codes at a time, sums stay in bytes as long as they fit.

    Parameters
    ----------
    packets : sequence of 1-D uint8 arrays
        Codes of `bits` bits, packed little-endian: code j occupies the bits from ``bits * j`` on.
        At least ``ceil(codes * bits / 8)`` bytes each.
    table : (2**bits,) integers
        What a code stands for: from 0 on, increasing, up to 255.
    bits : {2, 4}
        Width of a code.
    codes : int
        Codes of a packet.
    weights : sequence of int, optional
        1 to 255, one a packet; 1 each by default. A weight costs as if the packet came
        ``ceil(weight / floor(255 / table[-1]))`` times.
    lanes : {"auto", "uint8", "uint16", "uint32"}
        Type of the sums; "auto" takes the narrowest that cannot overflow.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    (codes,) array of the type `lanes`

    Raises
    ------
    InvalidInputError
        Sizes, table or weights that cannot be used, or lanes that could overflow.
    DTypeError
        A packet is not a uint8 array, or a weight not an integer.

    References
    ----------
    Li et al., "THC: Accelerating Distributed Deep Learning Using Tensor Homomorphic Compression",
    NSDI 2024, arXiv 2302.08545.

    Examples
    --------
    >>> import numpy as np
    >>> lut_add([np.array([0x10], np.uint8)] * 3, range(0, 32, 2), bits=4, codes=2)
    array([0, 6], dtype=uint8)
    """
    if bits not in (2, 4):
        raise InvalidInputError(f"bits: expected 2 or 4, got {bits!r}")
    if isinstance(codes, bool) or not isinstance(codes, int) or codes < 0:
        raise InvalidInputError(f"codes: expected an integer of at least 0, got {codes!r}")
    values = np.asarray(table)
    if values.dtype.kind not in "iu" or values.shape != (1 << bits,):
        raise InvalidInputError(
            f"table: expected {1 << bits} integers, got {values.dtype} {values.shape}"
        )
    values = values.astype(np.int64)
    if values[0] < 0 or values[-1] > LARGEST or (np.diff(values) <= 0).any():
        raise InvalidInputError(f"table: expected values increasing from 0 to at most {LARGEST}")
    need = -(-codes * bits // 8)
    rows = [_packet(x, i, need) for i, x in enumerate(packets)]
    factors = _weights(weights, len(rows))
    found = lut_lanes(sum(factors) * int(values[-1]), lanes)
    return _variants.choose("lut_add", "cpu", variant)(rows, values, bits, codes, factors, found)


def _packet(x: Any, i: int, need: int) -> np.ndarray:
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 1:
        raise DTypeError(f"packets[{i}]: expected a 1-D uint8 array, got {type(x).__name__}")
    if x.size < need:
        raise InvalidInputError(f"packets[{i}]: expected at least {need} bytes, got {x.size}")
    return np.ascontiguousarray(x)


def _weights(weights: Sequence[int] | None, n: int) -> list[int]:
    if weights is None:
        return [1] * n
    factors = list(weights)
    if len(factors) != n:
        raise InvalidInputError(f"weights: expected {n}, got {len(factors)}")
    for i, w in enumerate(factors):
        if isinstance(w, bool) or not isinstance(w, int | np.integer):
            raise DTypeError(
                f"weights[{i}]: expected an integer, since codes are added as integers, got {w!r}"
            )
        if not 1 <= w <= 255:
            raise InvalidInputError(f"weights[{i}]: expected 1 to 255, got {w}")
    return [int(w) for w in factors]


# ---- variants ----------------------------------------------------------------------------------


def _cpu(
    rows: list[np.ndarray],
    table: np.ndarray,
    bits: int,
    codes: int,
    weights: list[int],
    lanes: str,
) -> np.ndarray:
    addresses, tables = [], []
    most = max(1, LARGEST // int(table[-1]))  # of a weight whose table still fits in bytes
    for row, weight in zip(rows, weights, strict=True):
        for part in [most] * (weight // most) + [weight % most] * bool(weight % most):
            padded = np.zeros(16, np.uint8)
            padded[: table.size] = part * table
            addresses.append(_arrays.address(row))
            tables.append(padded.tolist())
    sums = np.empty(codes, lanes)
    _native.core.lut_add(
        packets=addresses,
        tables=tables,
        bits=bits,
        codes=codes,
        lane_bytes=sums.itemsize,
        sums=_arrays.address(sums),
        threads=_native.threads_for(codes * max(1, len(rows))),
    )
    return sums


def _reference(
    rows: list[np.ndarray],
    table: np.ndarray,
    bits: int,
    codes: int,
    weights: list[int],
    lanes: str,
) -> np.ndarray:
    tables = [w * table for w in weights]
    need = -(-codes * bits // 8)
    return reference.lut_add([x[:need] for x in rows], tables, bits, codes).astype(lanes)


_variants.add("lut_add", "cpu", lambda: _cpu, _variants.cpu_only)
_variants.add("lut_add", "reference", lambda: _reference, _variants.cpu_only)
