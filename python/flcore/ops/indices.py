"""Coordinates of sparse packets in few bits: validation and choice of variant."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore import _arrays, _native, _variants
from flcore.errors import DTypeError, InvalidInputError
from flcore.reference import indices as reference
from flcore.reference.wire_frame import TILE

__all__ = ["decode_indices", "encode_indices"]


def encode_indices(
    indices: np.ndarray, numel: int, coding: str = "rice", *, variant: str | None = None
) -> np.ndarray:
    """Write increasing coordinates as the section of a sparse packet.

    Parameters
    ----------
    indices : (k,) integer array
        Strictly increasing, from 0 to numel - 1.
    numel : int
        Number of coordinates d.
    coding : {"bitpack", "rice"}
        Gaps between coordinates at a common width for each 128 of them, or in Rice codes: at 1 % of
        the coordinates 9.7 and 8.2 bits an entry, with all that is around them.
    variant : {"reference", "cpu"}, optional
        Which implementation runs; all give the same bytes, as do all thread counts.

    Returns
    -------
    (nbytes,) uint8 array
        docs/packet.md describes it; entries of each tile are counted elsewhere in a packet.

    Raises
    ------
    InvalidInputError
        The coordinates are not increasing or leave the range.
    DTypeError
        They are not integers.

    References
    ----------
    Rice, "Some practical universal noiseless coding techniques", JPL publication 79-22, 1979.
    """
    _check(numel, coding)
    if not isinstance(indices, np.ndarray) or indices.ndim != 1 or indices.dtype.kind not in "iu":
        got = indices.dtype if isinstance(indices, np.ndarray) else type(indices).__name__
        raise DTypeError(f"indices: expected a 1-D array of integers, got {got}")
    if indices.size and (int(indices[0]) < 0 or int(indices[-1]) >= numel):
        raise InvalidInputError(
            f"indices: expected 0 <= index < {numel}, got {indices[0]} to {indices[-1]}"
        )
    indices = indices.astype(np.int64)
    if not np.all(np.diff(indices) > 0):
        raise InvalidInputError("indices: expected increasing coordinates")
    counts = np.bincount(indices // TILE, minlength=-(-numel // TILE))
    local = (indices % TILE).astype(np.uint16)
    return _variants.choose("encode_indices", "cpu", variant)(counts, local, numel, coding)


def decode_indices(
    section: Any,
    counts: np.ndarray,
    numel: int,
    coding: str = "rice",
    *,
    variant: str | None = None,
) -> np.ndarray:
    """Return the coordinates that a section holds, int64 (k,), after a check of every bit.

    Parameters
    ----------
    section : bytes or (nbytes,) uint8 array
        Whatever it holds, no byte outside of it is read.
    counts : (tiles,) integer array
        Entries of each tile of 65,536 coordinates.
    numel, coding, variant
        As in :func:`encode_indices`.

    Raises
    ------
    PacketError
        The section does not hold such coordinates in this coding.
    InvalidInputError
        A count is larger than its tile.
    """
    _check(numel, coding)
    counts = np.asarray(counts, np.int64)
    lengths = np.minimum(TILE, numel - TILE * np.arange(-(-numel // TILE), dtype=np.int64))
    if counts.shape != lengths.shape or np.any(counts < 0) or np.any(counts > lengths):
        raise InvalidInputError(
            f"counts: expected {lengths.size} counts that fit their tiles, got {counts.tolist()}"
        )
    data = np.frombuffer(section, np.uint8)
    local = _variants.choose("decode_indices", "cpu", variant)(data, counts, numel, coding)
    return local + np.repeat(TILE * np.arange(counts.size, dtype=np.int64), counts)


def _check(numel: int, coding: str) -> None:
    if isinstance(numel, bool) or not isinstance(numel, int) or not 0 <= numel <= 2**48:
        raise InvalidInputError(f"numel: expected an integer from 0 to 2**48, got {numel!r}")
    if coding not in reference.CODINGS:
        raise InvalidInputError(
            f"coding: expected one of {', '.join(reference.CODINGS)}, got {coding!r}"
        )


# ---- variants ----------------------------------------------------------------------------------


def _starts(counts: np.ndarray) -> list[int]:
    return [0, *np.cumsum(counts).tolist()]


def _cpu_encode(counts: np.ndarray, local: np.ndarray, numel: int, coding: str) -> np.ndarray:
    return _native.core.encode_indices(
        coding=reference.CODINGS[coding],
        numel=numel,
        starts=_starts(counts),
        local=_arrays.address(local),
        threads=_native.threads_for(local.size),
    )


def _cpu_decode(data: np.ndarray, counts: np.ndarray, numel: int, coding: str) -> np.ndarray:
    local = np.empty(int(counts.sum()), np.uint16)
    _native.core.decode_indices(
        coding=reference.CODINGS[coding],
        numel=numel,
        starts=_starts(counts),
        section=_arrays.address(data),
        bytes=data.size,
        local=_arrays.address(local),
        threads=_native.threads_for(local.size),
    )
    return local.astype(np.int64)


def _reference_encode(counts: np.ndarray, local: np.ndarray, numel: int, coding: str) -> np.ndarray:
    return np.frombuffer(reference.encode(counts, local, coding), np.uint8)


def _reference_decode(data: np.ndarray, counts: np.ndarray, numel: int, coding: str) -> np.ndarray:
    return reference.decode(data.tobytes(), counts, numel, coding)


_variants.add("encode_indices", "cpu", lambda: _cpu_encode, _variants.cpu_only)
_variants.add("encode_indices", "reference", lambda: _reference_encode, _variants.cpu_only)
_variants.add("decode_indices", "cpu", lambda: _cpu_decode, _variants.cpu_only)
_variants.add("decode_indices", "reference", lambda: _reference_decode, _variants.cpu_only)
