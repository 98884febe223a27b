"""The frame of packet version 1: header, section table, tensor table, checksum.

Constants and plain readers; what the sections of a codec must look like is in the modules
`wire_<family>`, and :mod:`flcore.reference.wire` puts the two together.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from flcore.errors import InvalidInputError, PacketError

HEADER_BYTES = 64
TABLE_BYTES = 8  # section count and a reserved word, before the entries
ENTRY_BYTES = 24
TENSOR_BYTES = 64  # a row of the tensor table
ALIGN = 64
TILE = 65_536  # coordinates a tile of a sparse packet: a local index fits in 16 bits
MAX_BUCKET = 65_536
SLACK_BYTES = 4096  # a payload is at most 8 bytes a coordinate, this, and the tensor table
HARD_MAX_NUMEL = 2**48  # products of sizes stay inside 64 bits

FLAG_CHECKSUM, FLAG_NONFINITE, FLAG_RESYNC, FLAG_INCREMENT = 1, 2, 4, 16
KNOWN_FLAGS = FLAG_CHECKSUM | FLAG_NONFINITE | FLAG_RESYNC | FLAG_INCREMENT

CODECS = {
    "dense": 0,
    "sparse": 1,
    "sign": 2,
    "uniform": 3,
    "affine": 4,
    "natural": 5,
    "minifloat": 6,
    "ternary": 7,
    "rotated": 8,
    "low_rank": 9,
    "sketch": 10,
    "thc": 11,
}
SOURCE_DTYPES = {"float64": 0, "float32": 1, "float16": 2, "bfloat16": 3}
VALUE_CODES = {"float32": 1, "float16": 2, "bfloat16": 3, "int8": 4, "e8m0": 5}
VALUE_BYTES = {1: 4, 2: 2, 3: 2, 4: 1, 5: 1}
EXPONENT_MASK = {1: 0x7F800000, 2: 0x7C00, 3: 0x7F80}  # all ones: NaN or infinity

SCALES, CODES, COUNTS, INDICES, VALUES, FACTOR_P, FACTOR_Q, CODEBOOK, TENSORS, NORM = range(1, 11)
PRIVATE = 0x8000

HEADER = struct.Struct("<4sBBHHHIQQQQIBBBBII")
ENTRY = struct.Struct("<HHIQQ")
TENSOR = struct.Struct("<QQQB7x8I")


INDEX_NAMES = {0: "seeded", 1: "bitmask", 2: "tile16", 3: "bitpack", 4: "rice"}


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

    ``epoch`` counts the packets that the sender's state produced before this one. ``value_dtype``
    is that of the values, of the scales of a bucket codec, or of factors. ``form`` is the index
    coding of a sparse packet, and a number the codec defines otherwise; ``tile`` the coordinates of
    a tile, bucket or block. ``crc`` is the CRC-32C of the whole packet with this field as zero (0
    when the packet carries none).
    """

    codec: str
    numel: int
    payload_bytes: int
    round: int
    seed: int
    epoch: int
    source_dtype: str
    value_dtype: str
    form: int
    bits: int
    tile: int
    flags: int
    crc: int
    major: int = 1
    minor: int = 0
    codec_revision: int = 0

    @property
    def index(self) -> str:
        """Name of the index coding of a sparse packet, "" for other codecs."""
        return INDEX_NAMES.get(self.form, "") if self.codec == "sparse" else ""

    @property
    def resync(self) -> bool:
        """True when the values are the whole state of a client, not a step of it."""
        return bool(self.flags & FLAG_RESYNC)

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


# ---- what a codec asks of its packets -----------------------------------------------------------


class Parts(NamedTuple):
    """A packet whose frame has been checked: header, bytes, offset and length of each section."""

    header: Header
    buffer: bytes
    found: dict[int, tuple[int, int]]

    def length(self, kind: int) -> int:
        """Return the bytes of a section, 0 if it is not there."""
        return self.found.get(kind, (0, 0))[1]

    def view(self, kind: int, dtype: str) -> np.ndarray:
        """Return a section as an array."""
        offset, length = self.found.get(kind, (0, 0))
        return np.frombuffer(self.buffer, dtype, length // np.dtype(dtype).itemsize, offset)

    def need(self, kind: int, what: str) -> int:
        """Return the bytes of a section that must be there."""
        need(kind in self.found, f"section type {kind} ({what}) is missing")
        return self.found[kind][1]


class Rules(NamedTuple):
    """What a codec asks of its packets; the functions raise `PacketError`.

    ``header(header)`` checks value dtype, form, bits and tile. ``elements(header)`` gives the bytes
    of an element of each section the codec has. ``lengths(parts)`` checks that sections are there
    and as long as header and tensor table say. ``contents(parts, tensors)`` checks the rest and
    returns the body.
    """

    header: Callable[[Header], None]
    elements: Callable[[Header], dict[int, int]]
    lengths: Callable[[Parts], None]
    contents: Callable[[Parts, tuple[TensorEntry, ...]], Any]


def align(offset: int) -> int:
    """Return the next multiple of 64."""
    return -(-offset // ALIGN) * ALIGN


def need(condition: bool, message: str) -> None:
    """Raise `PacketError` with `message` unless `condition`."""
    if not condition:
        raise PacketError(f"packet: {message}")


def name_of(table: dict[str, int], code: int, what: str) -> str:
    """Return the name of a code, or raise with the list of what is known."""
    for name, value in table.items():
        if value == code:
            return name
    known = ", ".join(f"{value} ({name})" for name, value in table.items())
    raise PacketError(f"packet: {what}: expected {known}, got {code}")


def read_table(
    buffer: bytes, size: int, elements: dict[int, int], codec: str
) -> dict[int, tuple[int, int]]:
    """Return offset and length of each known section: inside, aligned, one after another."""
    need(size >= HEADER_BYTES + TABLE_BYTES, f"no room for a section table in {size} bytes")
    count, reserved = struct.unpack_from("<II", buffer, HEADER_BYTES)
    need(reserved == 0, "the reserved word of the section table is not zero")
    room = (size - HEADER_BYTES - TABLE_BYTES) // ENTRY_BYTES
    need(count <= room, f"claims {count} sections, there is room for {room}")
    end = HEADER_BYTES + TABLE_BYTES + ENTRY_BYTES * count
    found: dict[int, tuple[int, int]] = {}
    for i in range(count):
        at = HEADER_BYTES + TABLE_BYTES + ENTRY_BYTES * i
        kind, flags, element, offset, length = ENTRY.unpack_from(buffer, at)
        start = align(end)
        need(
            offset == start,
            f"section {i} (type {kind}): expected offset {start} (64-byte aligned, after the "
            f"section before it), got {offset}",
        )
        need(
            offset <= size and length <= size - offset,
            f"section {i} (type {kind}) of {length} bytes at {offset} leaves the packet of {size}",
        )
        need(not any(buffer[end:offset]), f"the padding before section {i} is not zero")
        if kind < PRIVATE:
            need(kind in elements, f"section type {kind} is unknown for {codec}")
            need(kind not in found, f"section type {kind} appears twice")
            need(flags == 0, f"section {i} (type {kind}): unknown flags {flags:#x}")
            need(
                element == elements[kind],
                f"section {i} (type {kind}): expected elements of {elements[kind]} bytes, "
                f"got {element}",
            )
            found[kind] = (offset, length)
        end = offset + length
    need(end == size, f"the sections end at byte {end}, the packet at {size}")
    for kind, (_, length) in found.items():
        need(
            length % elements[kind] == 0,
            f"section type {kind}: {length} bytes are no multiple of {elements[kind]}",
        )
    return found


def tensor_entries(table: bytes, numel: int) -> tuple[TensorEntry, ...]:
    """Return the rows of a tensor table, checked: consecutive, and covering `numel` coordinates."""
    rows, end = [], 0
    for i, (hashed, offset, count, ndim, *dims) in enumerate(TENSOR.iter_unpack(table)):
        need(not any(table[64 * i + 25 : 64 * i + 32]), f"tensor {i}: its padding is not zero")
        need(ndim <= 8, f"tensor {i}: expected at most 8 dimensions, got {ndim}")
        need(not any(dims[ndim:]), f"tensor {i}: an unused dimension is not zero")
        product = int(np.prod(dims[:ndim], dtype=object)) if ndim else 1
        need(product == count, f"tensor {i}: its dimensions hold {product} values, not {count}")
        need(offset == end, f"tensor {i}: expected offset {end}, got {offset}")
        need(count <= numel - end, f"tensor {i} ends beyond coordinate {numel}")
        rows.append(TensorEntry(hashed, offset, tuple(dims[:ndim])))
        end += count
    need(not rows or end == numel, f"the tensor table covers {end} of {numel} coordinates")
    return tuple(rows)


def decode_values(raw: np.ndarray, values: str) -> np.ndarray:
    """Return the float32 numbers of bit patterns held in unsigned integers."""
    if values == "float32":
        return raw.astype(np.uint32).view(np.float32)
    if values == "float16":
        return raw.astype(np.uint16).view(np.float16).astype(np.float32)
    return (raw.astype(np.uint32) << 16).view(np.float32)


def all_finite(raw: np.ndarray, value_code: int) -> bool:
    """Whether no bit pattern of a floating dtype is a NaN or an infinity."""
    mask = EXPONENT_MASK[value_code]
    return bool(np.all(raw.astype(np.uint32) & mask != mask))
