"""Writing packets, version 1; :mod:`flcore.reference.wire` reads them and explains."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore.errors import InvalidInputError
from flcore.reference import wire_frame as wire
from flcore.reference import wire_sparse
from flcore.reference.wire_frame import TILE

__all__ = ["build", "frame", "name_hash", "pack_tensors", "packet_nbytes"]


def name_hash(name: str) -> int:
    """Return the 64-bit FNV-1a of a tensor's name in UTF-8."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def pack_tensors(names: list[str], shapes: list[tuple[int, ...]]) -> bytes:
    """Return the tensor table of layers that follow one another: 64 bytes a layer.

    Raises
    ------
    InvalidInputError
        A shape has more than eight dimensions or a dimension does not fit in 32 bits.
    """
    rows, offset = [], 0
    for name, shape in zip(names, shapes, strict=True):
        if len(shape) > 8 or any(dim >= 2**32 for dim in shape):
            raise InvalidInputError(
                f"layer {name!r}: a tensor table holds at most 8 dimensions below 2**32, "
                f"got shape {tuple(shape)}"
            )
        numel = int(np.prod(shape, dtype=object)) if shape else 1
        dims = (*shape, *([0] * (8 - len(shape))))
        rows.append(wire.TENSOR.pack(name_hash(name), offset, numel, len(shape), *dims))
        offset += numel
    return b"".join(rows)


def packet_nbytes(numel: int, k: int, index: str, values: str, tensors: int = 0) -> int:
    """Return the bytes of a sparse packet: `k` of `numel` coordinates, `tensors` table rows.

    Where they depend on the coordinates, the most that they can be: "bitpack" takes at most 16 bits
    an index and a byte for 128, "rice" 24 bits and 3 bytes a tile, "auto" and "smallest" as many as
    "tile16" or "bitmask".
    """
    rows = wire_sparse.tiles(numel)
    most = {"bitpack": rows + k // 128 + 2 * k, "rice": 3 * rows + min(3 * k, rows * TILE // 8)}
    if index in wire_sparse.CHOICES:
        index = "bitmask" if -(-numel // 8) < 2 * k else "tile16"
    coded = most.get(index, 0)
    table = tensors * wire.TENSOR_BYTES
    sections = wire_sparse.sections(numel, k, index, values, table, coded)
    end = wire.HEADER_BYTES + wire.TABLE_BYTES + wire.ENTRY_BYTES * len(sections)
    for _, _, length in sections:
        end = wire.align(end) + length
    return end


def frame(
    bodies: Sequence[tuple[int, int, bytes]],
    *,
    codec: str,
    numel: int,
    values: str,
    form: int,
    bits: int,
    tile: int,
    source_dtype: str = "float32",
    round: int = 0,
    seed: int = 0,
    epoch: int = 0,
    flags: int = 0,
    tensors: bytes = b"",
) -> bytes:
    """Return a packet with these sections.

    Parameters
    ----------
    bodies : sequence of (type, bytes an element, content)
        The sections in the order they are written, without the tensor table.
    codec, numel, values, form, bits, tile
        What the header says; `values` names the dtype of values, scales or factors.
    flags : int
        Header flags without FLAG_CHECKSUM, which is always set.
    tensors : bytes
        A table of :func:`pack_tensors`, or nothing.
    """
    sections = [*bodies, (wire.TENSORS, wire.TENSOR_BYTES, tensors)] if tensors else [*bodies]
    base = end = wire.HEADER_BYTES + wire.TABLE_BYTES + wire.ENTRY_BYTES * len(sections)
    table, content = struct.pack("<II", len(sections), 0), []
    for kind, element, data in sections:
        start = wire.align(end)
        content += [bytes(start - end), data]
        table += wire.ENTRY.pack(kind, 0, element, start, len(data))
        end = start + len(data)
    payload = table + b"".join(content)
    assert len(payload) == end - base + len(table)
    fields: tuple = (b"FLCU", 1, 0, wire.HEADER_BYTES, wire.CODECS[codec], 0)
    fields += (flags | wire.FLAG_CHECKSUM, numel, len(payload), round, seed, epoch)
    fields += (wire.SOURCE_DTYPES[source_dtype], wire.VALUE_CODES[values], form, bits, tile)
    crc = wire.crc32c(payload, wire.crc32c(wire.HEADER.pack(*fields, 0)))
    return wire.HEADER.pack(*fields, crc) + payload


def build(
    indices: np.ndarray,
    raw_values: np.ndarray,
    *,
    numel: int,
    values: str,
    index: str,
    scales: np.ndarray | None = None,
    tensors: bytes = b"",
    **fields: Any,
) -> bytes:
    """Return a sparse packet.

    Parameters
    ----------
    indices : (k,) integers, strictly increasing, below `numel`
    raw_values : (k,) uint32, uint16 or uint8
        Bit patterns of the values in the dtype that `values` names.
    index : {"bitmask", "tile16", "bitpack", "rice", "auto", "smallest", "seeded"}
        Seeded: the `indices` must be those that seed and round of the header give.
    scales : (tiles,) float32, optional
        With int8 values: what the codes of each tile multiply.
    tensors : bytes
        A table of :func:`pack_tensors`, or nothing.
    fields
        Header fields of :func:`frame`.
    """
    indices = np.asarray(indices, dtype=np.int64)
    counts = np.bincount(indices // TILE, minlength=wire_sparse.tiles(numel))
    if index in wire_sparse.CHOICES:
        index = wire_sparse.smallest(indices, counts, numel, wire_sparse.CHOICES[index])
    coded = wire_sparse.index_section(indices, counts, numel, index)
    value_bytes = wire.VALUE_BYTES[wire.VALUE_CODES[values]]
    bodies = {
        wire.SCALES: b"" if scales is None else scales.astype("<f4").tobytes(),
        wire.COUNTS: counts.astype("<u4").tobytes(),
        wire.INDICES: coded,
        wire.VALUES: raw_values.astype(f"<u{value_bytes}").tobytes(),
    }
    sections = wire_sparse.sections(numel, indices.size, index, values, 0, len(coded))
    codes = {name: code for code, name in wire.INDEX_NAMES.items()}
    return frame(
        [(kind, element, bodies[kind]) for kind, element, _ in sections],
        codec="sparse",
        numel=numel,
        values=values,
        form=codes[index],
        bits=8 * value_bytes,
        tile=TILE,
        tensors=tensors,
        **fields,
    )
