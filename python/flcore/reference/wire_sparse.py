"""Sparse packets: tile counts, indices, values. Rules and layout."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flcore.reference.wire_frame import (
    COUNTS,
    INDICES,
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

__all__ = ["INDEX_CODINGS", "RULES", "VALUE_DTYPES", "SparseBody", "sections", "tiles"]

INDEX_CODINGS = {"bitmask": 1, "tile16": 2}
VALUE_DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3}


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


def sections(numel: int, k: int, index: str, value_bytes: int, tensor_bytes: int):
    """Type, element bytes and length of each section, in the order they are written."""
    index_length = 2 * k if index == "tile16" else -(-numel // 8)
    sections = [
        (COUNTS, 4, 4 * tiles(numel)),
        (INDICES, 2 if index == "tile16" else 1, index_length),
        (VALUES, value_bytes, value_bytes * k),
    ]
    if tensor_bytes:
        sections.append((TENSORS, TENSOR_BYTES, tensor_bytes))
    return sections


def _check_header(header: Header) -> None:
    name_of(VALUE_DTYPES, VALUE_CODES[header.value_dtype], "value dtype")
    name_of(INDEX_CODINGS, header.form, "index coding")
    want = 8 * VALUE_BYTES[VALUE_DTYPES[header.value_dtype]]
    need(
        header.bits == want,
        f"expected {want} bits a value of {header.value_dtype}, got {header.bits}",
    )
    need(header.tile == TILE, f"expected tiles of {TILE} coordinates, got {header.tile}")


def _elements(header: Header) -> dict[int, int]:
    return {COUNTS: 4, INDICES: 2 if header.index == "tile16" else 1, VALUES: header.bits // 8}


def _check_lengths(parts: Parts) -> None:
    numel = parts.header.numel
    for kind, what in ((COUNTS, "tile counts"), (INDICES, "indices"), (VALUES, "values")):
        parts.need(kind, what)
    value_bytes = parts.header.bits // 8
    k = parts.length(VALUES) // value_bytes
    need(k <= numel, f"holds {k} values for {numel} coordinates")
    for kind, _, length in sections(numel, k, parts.header.index, value_bytes, 0):
        need(
            parts.length(kind) == length,
            f"section type {kind}: expected {length} bytes for {k} of {numel} coordinates, "
            f"got {parts.length(kind)}",
        )


def _contents(parts: Parts, tensors: tuple[TensorEntry, ...]) -> SparseBody:
    header, numel = parts.header, parts.header.numel
    k = parts.length(VALUES) // (header.bits // 8)
    counts = parts.view(COUNTS, "<u4").astype(np.int64)
    lengths = np.minimum(TILE, numel - TILE * np.arange(counts.size, dtype=np.int64))
    need(bool(np.all(counts <= lengths)), "a tile count exceeds the coordinates of its tile")
    need(int(counts.sum()) == k, f"the tile counts sum to {counts.sum()}, there are {k} values")
    if header.index == "tile16":
        local = parts.view(INDICES, "<u2").astype(np.int64)
        indices = local + np.repeat(TILE * np.arange(counts.size, dtype=np.int64), counts)
        same_tile = np.diff(np.repeat(np.arange(counts.size), counts)) == 0
        need(bool(np.all(np.diff(local)[same_tile] > 0)), "the indices of a tile do not increase")
        need(bool(np.all(indices < numel)), f"an index is not below {numel}")
    else:
        bits = np.unpackbits(parts.view(INDICES, "u1"), bitorder="little")
        need(not bits[numel:].any(), "a pad bit of the bitmask is set")
        indices = np.flatnonzero(bits)
        per_tile = np.bincount(indices // TILE, minlength=counts.size)
        need(bool(np.array_equal(per_tile, counts)), "the bitmask does not match the tile counts")
    raw = parts.view(VALUES, f"<u{header.bits // 8}")
    need(all_finite(raw, VALUE_DTYPES[header.value_dtype]), "a value is not finite")
    return SparseBody(indices, decode_values(raw, header.value_dtype), counts, tensors)


RULES = Rules(_check_header, _elements, _check_lengths, _contents)
