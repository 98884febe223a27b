"""Sparse packets: scales, tile counts, indices, values. Rules and layout."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flcore.reference import indices as coded
from flcore.reference import permutation
from flcore.reference.wire_frame import (
    COUNTS,
    INDEX_NAMES,
    INDICES,
    SCALES,
    TENSOR_BYTES,
    TENSORS,
    TILE,
    VALUE_BYTES,
    VALUE_CODES,
    VALUES,
    Header,
    Parts,
    Rules,
    TensorEntry,
    all_finite,
    decode_values,
    name_of,
    need,
)

__all__ = [
    "CHOICES",
    "INDEX_CODINGS",
    "LARGEST",
    "RULES",
    "VALUE_DTYPES",
    "SparseBody",
    "index_section",
    "sections",
    "smallest",
    "tiles",
    "values_of",
]

INDEX_CODINGS = {"bitmask": 1, "tile16": 2, "bitpack": 3, "rice": 4}
"""Codings of coordinates that are in the packet; 0 is "seeded": they follow from the seed."""
VALUE_DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3, "int8": 4}
LARGEST = 3.402823e38
"""No code may decode to more."""


class SparseBody(NamedTuple):
    """Contents of a sparse packet, checked.

    ``indices`` int64 [k], strictly increasing; ``values`` float32 [k], finite; ``counts`` entries
    of each tile, int64 [tiles].
    """

    indices: np.ndarray
    values: np.ndarray
    counts: np.ndarray
    tensors: tuple[TensorEntry, ...]


def tiles(numel: int) -> int:
    """Return the number of tiles."""
    return -(-numel // TILE)


def sections(
    numel: int, k: int, index: str, values: str, tensor_bytes: int, coded_bytes: int = 0
) -> list[tuple[int, int, int]]:
    """Type, element bytes and length of each section, in the order they are written.

    `coded_bytes`: length of the indices where it depends on them ("bitpack" and "rice").
    """
    per_tile, size = 4 * tiles(numel), VALUE_BYTES[VALUE_CODES[values]]
    lengths = {"seeded": 0, "bitmask": -(-numel // 8), "tile16": 2 * k}
    wanted = [
        (SCALES, 4, per_tile),
        (COUNTS, 4, per_tile),
        (INDICES, 2 if index == "tile16" else 1, lengths.get(index, coded_bytes)),
        (VALUES, size, size * k),
        (TENSORS, TENSOR_BYTES, tensor_bytes),
    ]
    absent = {SCALES} if values != "int8" else set()
    absent |= {INDICES} if index == "seeded" else set()
    absent |= set() if tensor_bytes else {TENSORS}
    return [section for section in wanted if section[0] not in absent]


def index_section(indices: np.ndarray, counts: np.ndarray, numel: int, index: str) -> bytes:
    """Return the section that holds the coordinates `indices`; nothing when they are seeded."""
    local = indices % TILE
    if index == "tile16":
        return local.astype("<u2").tobytes()
    if index == "bitmask":
        mask = np.zeros(numel, dtype=bool)
        mask[indices] = True
        return np.packbits(mask, bitorder="little").tobytes()
    return b"" if index == "seeded" else coded.encode(counts, local, index)


CHOICES = {"auto": ("tile16", "bitmask"), "smallest": ("tile16", "bitmask", "bitpack", "rice")}
"""Codings that a writer chooses among, by the name of the choice."""


def smallest(indices: np.ndarray, counts: np.ndarray, numel: int, among: tuple[str, ...]) -> str:
    """Return the index coding of fewest bytes; of equal ones the first of `among`."""
    return min(among, key=lambda index: len(index_section(indices, counts, numel, index)))


def values_of(raw: np.ndarray, values: str, counts: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the float32 numbers of bit patterns; int8 ones are times the scale of their tile."""
    if values != "int8":
        return decode_values(raw, values)
    return np.repeat(scales, counts) * raw.astype(np.uint8).view(np.int8).astype(np.float32)


# ---- rules -----------------------------------------------------------------------------------


def _check_header(header: Header) -> None:
    name_of(VALUE_DTYPES, VALUE_CODES[header.value_dtype], "value dtype")
    name_of({name: code for code, name in INDEX_NAMES.items()}, header.form, "index coding")
    want = 8 * VALUE_BYTES[VALUE_DTYPES[header.value_dtype]]
    need(
        header.bits == want,
        f"expected {want} bits a value of {header.value_dtype}, got {header.bits}",
    )
    need(header.tile == TILE, f"expected tiles of {TILE} coordinates, got {header.tile}")


def _elements(header: Header) -> dict[int, int]:
    kinds = sections(1, 1, header.index, header.value_dtype, 0)
    return {kind: element for kind, element, _ in kinds}


def _check_lengths(parts: Parts) -> None:
    header, numel = parts.header, parts.header.numel
    parts.need(VALUES, "values")
    k = parts.length(VALUES) // (header.bits // 8)
    need(k <= numel, f"holds {k} values for {numel} coordinates")
    words = {SCALES: "scales", COUNTS: "tile counts", INDICES: "indices", VALUES: "values"}
    free = parts.length(INDICES)  # the length of coded indices follows from their contents
    for kind, _, length in sections(numel, k, header.index, header.value_dtype, 0, free):
        parts.need(kind, words[kind])
        need(
            parts.length(kind) == length,
            f"section type {kind}: expected {length} bytes for {k} of {numel} coordinates, "
            f"got {parts.length(kind)}",
        )


def _indices(parts: Parts, counts: np.ndarray, k: int) -> np.ndarray:
    header, numel = parts.header, parts.header.numel
    first = np.repeat(TILE * np.arange(counts.size, dtype=np.int64), counts)
    if header.index == "tile16":
        local = parts.view(INDICES, "<u2").astype(np.int64)
        same_tile = np.diff(np.repeat(np.arange(counts.size), counts)) == 0
        need(bool(np.all(np.diff(local)[same_tile] > 0)), "the indices of a tile do not increase")
        need(bool(np.all(local + first < numel)), f"an index is not below {numel}")
        return local + first
    if header.index in coded.CODINGS:
        section = parts.view(INDICES, "u1").tobytes()
        return coded.decode(section, counts, numel, header.index) + first
    if header.index == "seeded":
        indices = permutation.coordinates(numel, k, header.seed, header.round)
        words = "the tile counts are not those that the seed gives"
    else:
        bits = np.unpackbits(parts.view(INDICES, "u1"), bitorder="little")
        need(not bits[numel:].any(), "a pad bit of the bitmask is set")
        indices = np.flatnonzero(bits)
        words = "the bitmask does not match the tile counts"
    need(np.array_equal(np.bincount(indices // TILE, minlength=counts.size), counts), words)
    return indices


def _contents(parts: Parts, tensors: tuple[TensorEntry, ...]) -> SparseBody:
    header, numel = parts.header, parts.header.numel
    k = parts.length(VALUES) // (header.bits // 8)
    counts = parts.view(COUNTS, "<u4").astype(np.int64)
    lengths = np.minimum(TILE, numel - TILE * np.arange(counts.size, dtype=np.int64))
    need(bool(np.all(counts <= lengths)), "a tile count exceeds the coordinates of its tile")
    need(int(counts.sum()) == k, f"the tile counts sum to {counts.sum()}, there are {k} values")
    indices = _indices(parts, counts, k)
    raw = parts.view(VALUES, f"<u{header.bits // 8}")
    scales = np.ones(counts.size, np.float32)
    if header.value_dtype == "int8":
        scales = parts.view(SCALES, "<f4")
        for t in range(scales.size):
            need(
                not np.signbit(scales[t]) and 127 * float(scales[t]) <= LARGEST,
                f"tile {t}: a scale is negative, not finite or too large",
            )
        need(not np.any(raw == 0x80), "a value is -128, which is not used")
    else:
        need(all_finite(raw, VALUE_DTYPES[header.value_dtype]), "a value is not finite")
    values = values_of(raw, header.value_dtype, counts, scales)
    return SparseBody(indices, values, counts, tensors)


RULES = Rules(_check_header, _elements, _check_lengths, _contents)
