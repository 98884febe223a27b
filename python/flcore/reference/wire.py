"""The byte format of compressed updates, packet version 1: layout and a plain reader.

With :mod:`flcore.reference.wire_writer` this is the definition (docs/packet.md says the same in
words): the C++ of ``csrc/wire.cpp`` accepts the same packets and writes the same bytes. Bytes and
arrays only; which coordinates are kept is decided in :mod:`flcore.reference.sparsify`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from flcore.errors import InvalidInputError, PacketError

__all__ = [
    "CODECS",
    "FLAG_CHECKSUM",
    "FLAG_INCREMENT",
    "FLAG_NONFINITE",
    "FLAG_RESYNC",
    "INDEX_CODINGS",
    "SOURCE_DTYPES",
    "TILE",
    "VALUE_DTYPES",
    "Header",
    "Limits",
    "SparseBody",
    "TensorEntry",
    "crc32c",
    "decode_values",
    "parse",
    "read_header",
    "tensor_entries",
]

HEADER_BYTES = 64
TABLE_BYTES = 8  # section count and a reserved word, before the entries
ENTRY_BYTES = 24
TENSOR_BYTES = 64  # a row of the tensor table
ALIGN = 64
TILE = 65_536  # coordinates a tile: a local index fits in 16 bits
SLACK_BYTES = 4096  # a payload is at most 8 bytes a coordinate, this, and the tensor table
HARD_MAX_NUMEL = 2**48  # products of sizes stay inside 64 bits

FLAG_CHECKSUM, FLAG_NONFINITE, FLAG_RESYNC, FLAG_INCREMENT = 1, 2, 4, 16
_KNOWN_FLAGS = FLAG_CHECKSUM | FLAG_NONFINITE | FLAG_RESYNC | FLAG_INCREMENT

CODECS = {"sparse": 1}
INDEX_CODINGS = {"bitmask": 1, "tile16": 2}
SOURCE_DTYPES = {"float64": 0, "float32": 1, "float16": 2, "bfloat16": 3}
VALUE_DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3}
VALUE_BYTES = {1: 4, 2: 2, 3: 2}
_EXPONENT_MASK = {1: 0x7F800000, 2: 0x7C00, 3: 0x7F80}  # all ones: NaN or infinity

COUNTS, INDICES, VALUES, TENSORS, _PRIVATE = 3, 4, 5, 9, 0x8000

HEADER = struct.Struct("<4sBBHHHIQQQQIBBBBII")
ENTRY = struct.Struct("<HHIQQ")
TENSOR = struct.Struct("<QQQB7x8I")


@dataclass(frozen=True)
class Limits:
    """What a receiver is ready to accept; checked before anything is allocated.

    Parameters
    ----------
    max_numel : int
        Coordinates of the decoded update, at most 2**48. Default 2**32: 16 GiB once decoded.
    max_payload_bytes : int
        Bytes after the 64-byte header. Whatever this says, a payload may not exceed
        8 bytes a coordinate plus 4 KiB plus the tensor table.
    max_tensors : int
        Entries of the optional tensor table.
    """

    max_numel: int = 2**32
    max_payload_bytes: int = 2**35
    max_tensors: int = 2**16

    def __post_init__(self) -> None:
        for name, top in (
            ("max_numel", HARD_MAX_NUMEL),
            ("max_payload_bytes", 2**62),
            ("max_tensors", 2**32),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= top:
                raise InvalidInputError(
                    f"{name}: expected an integer from 0 to {top}, got {value!r}"
                )


@dataclass(frozen=True)
class Header:
    """The first 64 bytes of a packet, read.

    ``epoch`` counts the packets that the sender's state produced before this one. ``crc`` is the
    CRC-32C of the whole packet with this field as zero (0 when the packet carries none).
    """

    codec: str
    numel: int
    payload_bytes: int
    round: int
    seed: int
    epoch: int
    source_dtype: str
    value_dtype: str
    index: str
    bits: int
    tile: int
    flags: int
    crc: int
    major: int = 1
    minor: int = 0
    codec_revision: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole packet, header included."""
        return HEADER_BYTES + self.payload_bytes

    @property
    def nonfinite(self) -> bool:
        """True when the sender met a NaN or an infinity and sent nothing instead."""
        return bool(self.flags & FLAG_NONFINITE)

    @property
    def increment(self) -> bool:
        """True when the values are increments to a state that the server keeps (EControl)."""
        return bool(self.flags & FLAG_INCREMENT)


class TensorEntry(NamedTuple):
    """One row of the tensor table: where a named tensor lies in the flat update."""

    name_hash: int
    offset: int
    shape: tuple[int, ...]


class SparseBody(NamedTuple):
    """Contents of a sparse packet, checked.

    ``indices`` int64 [k], strictly increasing; ``values`` float32 [k], finite; ``counts`` entries
    of each tile, int64 [tiles].
    """

    indices: np.ndarray
    values: np.ndarray
    counts: np.ndarray
    tensors: tuple[TensorEntry, ...]


@lru_cache(maxsize=1)
def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


def crc32c(data: bytes, crc: int = 0) -> int:
    """Return the CRC-32C (Castagnoli) of `data`; `crc` is the sum over what came before."""
    table = _crc_table()
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


# ---- layout ----------------------------------------------------------------------------------


def align(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def tiles(numel: int) -> int:
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


# ---- reading ---------------------------------------------------------------------------------


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise PacketError(f"packet: {message}")


def _name(table: dict[str, int], code: int, what: str) -> str:
    for name, value in table.items():
        if value == code:
            return name
    known = ", ".join(f"{value} ({name})" for name, value in table.items())
    raise PacketError(f"packet: {what}: expected {known}, got {code}")


def read_header(buffer: bytes, limits: Limits | None = None) -> Header:
    """Read and check the first 64 bytes; sections and checksum are not looked at.

    Raises
    ------
    PacketError
        Not a packet, a version or codec this reader does not know, or beyond `limits`.
    """
    limits = limits or Limits()
    size = len(buffer)
    _need(size >= HEADER_BYTES, f"expected at least {HEADER_BYTES} bytes, got {size}")
    fields = HEADER.unpack(bytes(buffer[:HEADER_BYTES]))
    magic, major, minor, header_bytes, codec, revision, flags, numel, payload = fields[:9]
    round_, seed, epoch, source, value, index, bits, tile, crc = fields[9:]
    _need(magic == b"FLCU", f"expected the magic bytes 'FLCU', got {magic!r}")
    _need(major == 1, f"expected format version 1, got {major}")
    _need(header_bytes == HEADER_BYTES, f"expected a header of 64 bytes, got {header_bytes}")
    codec_name = _name(CODECS, codec, "codec")
    _need(revision == 0, f"expected revision 0 of codec 1 (sparse), got {revision}")
    _need(flags & ~_KNOWN_FLAGS == 0, f"flags {flags:#x} hold bits unknown for codec 1 (sparse)")
    _need(bool(flags & FLAG_CHECKSUM) or crc == 0, "the checksum field is set but its flag is not")
    value_name = _name(VALUE_DTYPES, value, "value dtype")
    source_name = _name(SOURCE_DTYPES, source, "source dtype")
    index_name = _name(INDEX_CODINGS, index, "index coding")
    want = 8 * VALUE_BYTES[value]
    _need(bits == want, f"expected {want} bits a value of {value_name}, got {bits}")
    _need(tile == TILE, f"expected tiles of {TILE} coordinates, got {tile}")
    _need(
        numel <= limits.max_numel,
        f"claims {numel} coordinates, the receiver's limit max_numel is {limits.max_numel}",
    )
    _need(
        payload <= limits.max_payload_bytes,
        f"claims a payload of {payload} bytes, the receiver's limit max_payload_bytes is "
        f"{limits.max_payload_bytes}",
    )
    return Header(codec_name, numel, payload, round_, seed, epoch, source_name, value_name,
                  index_name, bits, tile, flags, crc, major, minor, revision)  # fmt: skip


def _read_table(buffer: bytes, size: int, elements: dict[int, int]) -> dict[int, tuple[int, int]]:
    """Return offset and length of each known section: inside, aligned, one after another."""
    _need(size >= HEADER_BYTES + TABLE_BYTES, f"no room for a section table in {size} bytes")
    count, reserved = struct.unpack_from("<II", buffer, HEADER_BYTES)
    _need(reserved == 0, "the reserved word of the section table is not zero")
    room = (size - HEADER_BYTES - TABLE_BYTES) // ENTRY_BYTES
    _need(count <= room, f"claims {count} sections, there is room for {room}")
    end = HEADER_BYTES + TABLE_BYTES + ENTRY_BYTES * count
    found: dict[int, tuple[int, int]] = {}
    for i in range(count):
        at = HEADER_BYTES + TABLE_BYTES + ENTRY_BYTES * i
        kind, flags, element, offset, length = ENTRY.unpack_from(buffer, at)
        start = align(end)
        _need(
            offset == start,
            f"section {i} (type {kind}): expected offset {start} (64-byte aligned, after the "
            f"section before it), got {offset}",
        )
        _need(
            offset <= size and length <= size - offset,
            f"section {i} (type {kind}) of {length} bytes at {offset} leaves the packet of {size}",
        )
        _need(not any(buffer[end:offset]), f"the padding before section {i} is not zero")
        if kind < _PRIVATE:
            _need(kind in elements, f"section type {kind} is unknown for codec 1 (sparse)")
            _need(kind not in found, f"section type {kind} appears twice")
            _need(flags == 0, f"section {i} (type {kind}): unknown flags {flags:#x}")
            _need(
                element == elements[kind],
                f"section {i} (type {kind}): expected elements of {elements[kind]} bytes, "
                f"got {element}",
            )
            found[kind] = (offset, length)
        end = offset + length
    _need(end == size, f"the sections end at byte {end}, the packet at {size}")
    return found


def tensor_entries(table: bytes, numel: int) -> tuple[TensorEntry, ...]:
    """Return the rows of a tensor table, checked: consecutive, and covering `numel` coordinates."""
    rows, end = [], 0
    for i, (hashed, offset, count, ndim, *dims) in enumerate(TENSOR.iter_unpack(table)):
        _need(not any(table[64 * i + 25 : 64 * i + 32]), f"tensor {i}: its padding is not zero")
        _need(ndim <= 8, f"tensor {i}: expected at most 8 dimensions, got {ndim}")
        _need(not any(dims[ndim:]), f"tensor {i}: an unused dimension is not zero")
        product = int(np.prod(dims[:ndim], dtype=object)) if ndim else 1
        _need(product == count, f"tensor {i}: its dimensions hold {product} values, not {count}")
        _need(offset == end, f"tensor {i}: expected offset {end}, got {offset}")
        _need(count <= numel - end, f"tensor {i} ends beyond coordinate {numel}")
        rows.append(TensorEntry(hashed, offset, tuple(dims[:ndim])))
        end += count
    _need(not rows or end == numel, f"the tensor table covers {end} of {numel} coordinates")
    return tuple(rows)


def parse(buffer: bytes, limits: Limits | None = None) -> tuple[Header, SparseBody]:
    """Read a whole packet and check everything in it.

    Order: header, section table and lengths against numel, k and bits, checksum, contents.

    Raises
    ------
    PacketError
        Anything is not as docs/packet.md says; the message names what was expected and what came.
    """
    limits = limits or Limits()
    buffer = bytes(buffer)
    size = len(buffer)
    header = read_header(buffer, limits)
    numel = header.numel
    _need(
        size == header.nbytes,
        f"the header says {header.nbytes} bytes, the buffer holds {size}",
    )
    value_bytes = header.bits // 8
    tile16 = header.index == "tile16"
    elements = {COUNTS: 4, INDICES: 2 if tile16 else 1, VALUES: value_bytes, TENSORS: 64}
    found = _read_table(buffer, size, elements)
    for kind, what in ((COUNTS, "tile counts"), (INDICES, "indices"), (VALUES, "values")):
        _need(kind in found, f"section type {kind} ({what}) is missing")
    values_length = found[VALUES][1]
    _need(
        values_length % value_bytes == 0,
        f"values of {values_length} bytes are no multiple of {value_bytes}",
    )
    k = values_length // value_bytes
    _need(k <= numel, f"holds {k} values for {numel} coordinates")
    for kind, _, length in sections(numel, k, header.index, value_bytes, 0):
        _need(
            found[kind][1] == length,
            f"section type {kind}: expected {length} bytes for {k} of {numel} coordinates, "
            f"got {found[kind][1]}",
        )
    table_offset, table_length = found.get(TENSORS, (size, 0))
    _need(table_length % 64 == 0, f"a tensor table of {table_length} bytes is no multiple of 64")
    _need(
        table_length // 64 <= limits.max_tensors,
        f"{table_length // 64} tensors, the receiver's limit max_tensors is {limits.max_tensors}",
    )
    allowed = 8 * numel + SLACK_BYTES + table_length
    _need(
        header.payload_bytes <= allowed,
        f"a payload of {header.payload_bytes} bytes for {numel} coordinates, at most {allowed}",
    )
    if header.flags & FLAG_CHECKSUM:
        crc = crc32c(buffer[HEADER_BYTES:], crc32c(buffer[:60] + bytes(4)))
        _need(crc == header.crc, "the checksum of the bytes differs from the header's")

    def view(kind: int, dtype: str) -> np.ndarray:
        offset, length = found[kind]
        return np.frombuffer(buffer, dtype, length // np.dtype(dtype).itemsize, offset)

    counts = view(COUNTS, "<u4").astype(np.int64)
    lengths = np.minimum(TILE, numel - TILE * np.arange(counts.size, dtype=np.int64))
    _need(bool(np.all(counts <= lengths)), "a tile count exceeds the coordinates of its tile")
    _need(int(counts.sum()) == k, f"the tile counts sum to {counts.sum()}, there are {k} values")
    if tile16:
        local = view(INDICES, "<u2").astype(np.int64)
        indices = local + np.repeat(TILE * np.arange(counts.size, dtype=np.int64), counts)
        same_tile = np.diff(np.repeat(np.arange(counts.size), counts)) == 0
        _need(bool(np.all(np.diff(local)[same_tile] > 0)), "the indices of a tile do not increase")
        _need(bool(np.all(indices < numel)), f"an index is not below {numel}")
    else:
        bits = np.unpackbits(view(INDICES, "u1"), bitorder="little")
        _need(not bits[numel:].any(), "a pad bit of the bitmask is set")
        indices = np.flatnonzero(bits)
        per_tile = np.bincount(indices // TILE, minlength=counts.size)
        _need(bool(np.array_equal(per_tile, counts)), "the bitmask does not match the tile counts")
    raw = view(VALUES, f"<u{value_bytes}").astype(np.uint32)
    mask = _EXPONENT_MASK[VALUE_DTYPES[header.value_dtype]]
    _need(bool(np.all(raw & mask != mask)), "a value is not finite")
    tensors = tensor_entries(buffer[table_offset : table_offset + table_length], numel)
    return header, SparseBody(indices, decode_values(raw, header.value_dtype), counts, tensors)


def decode_values(raw: np.ndarray, values: str) -> np.ndarray:
    """Return the float32 numbers of bit patterns held in unsigned integers."""
    if values == "float32":
        return raw.astype(np.uint32).view(np.float32)
    if values == "float16":
        return raw.astype(np.uint16).view(np.float16).astype(np.float32)
    return (raw.astype(np.uint32) << 16).view(np.float32)
