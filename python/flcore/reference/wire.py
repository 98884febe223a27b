"""The byte format of compressed updates, packet version 1: a plain reader of whole packets.

With :mod:`flcore.reference.wire_writer` this is the definition (docs/packet.md says the same in
words): the C++ of ``csrc/wire*.cpp`` accepts the same packets and writes the same bytes. Bytes and
arrays only; which values are sent is decided in the modules of the codecs.
"""

from __future__ import annotations

from typing import Any

from flcore.reference import wire_bucket, wire_low_rank, wire_sketch, wire_sparse, wire_thc
from flcore.reference.wire_bucket import BucketBody
from flcore.reference.wire_frame import (
    CODECS,
    FLAG_CHECKSUM,
    FLAG_INCREMENT,
    FLAG_NONFINITE,
    FLAG_RESYNC,
    HARD_MAX_NUMEL,
    HEADER,
    HEADER_BYTES,
    KNOWN_FLAGS,
    SLACK_BYTES,
    SOURCE_DTYPES,
    TENSORS,
    TILE,
    VALUE_CODES,
    Header,
    Limits,
    Parts,
    Rules,
    TensorEntry,
    crc32c,
    decode_values,
    name_of,
    need,
    read_table,
    tensor_entries,
)
from flcore.reference.wire_sparse import INDEX_CODINGS, VALUE_DTYPES, SparseBody

__all__ = [
    "CODECS",
    "FLAG_CHECKSUM",
    "FLAG_INCREMENT",
    "FLAG_NONFINITE",
    "FLAG_RESYNC",
    "HARD_MAX_NUMEL",
    "INDEX_CODINGS",
    "RULES",
    "SOURCE_DTYPES",
    "TILE",
    "VALUE_DTYPES",
    "BucketBody",
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

RULES: dict[str, Rules] = {
    "sparse": wire_sparse.RULES,
    **dict.fromkeys(wire_bucket.CODEC_NAMES, wire_bucket.RULES),
    "low_rank": wire_low_rank.RULES,
    "sketch": wire_sketch.RULES,
    "thc": wire_thc.RULES,
}
"""What each codec asks of its packets, by the codec's name."""

_KNOWN = {name: code for name, code in CODECS.items() if name in RULES}


def read_header(buffer: bytes, limits: Limits | None = None) -> Header:
    """Read and check the first 64 bytes; sections and checksum are not looked at.

    Raises
    ------
    PacketError
        Not a packet, a version or codec this reader does not know, or beyond `limits`.
    """
    limits = limits or Limits()
    size = len(buffer)
    need(size >= HEADER_BYTES, f"expected at least {HEADER_BYTES} bytes, got {size}")
    fields = HEADER.unpack(bytes(buffer[:HEADER_BYTES]))
    magic, major, minor, header_bytes, codec, revision, flags, numel, payload = fields[:9]
    round_, seed, epoch, source, value, form, bits, tile, crc = fields[9:]
    need(magic == b"FLCU", f"expected the magic bytes 'FLCU', got {magic!r}")
    need(major == 1, f"expected format version 1, got {major}")
    need(header_bytes == HEADER_BYTES, f"expected a header of 64 bytes, got {header_bytes}")
    codec_name = name_of(_KNOWN, codec, "codec")
    words = f"codec {codec} ({codec_name})"
    need(revision == 0, f"expected revision 0 of {words}, got {revision}")
    need(flags & ~KNOWN_FLAGS == 0, f"flags {flags} hold bits unknown for {words}")
    need(bool(flags & FLAG_CHECKSUM) or crc == 0, "the checksum field is set but its flag is not")
    value_name = name_of(VALUE_CODES, value, "value dtype")
    source_name = name_of(SOURCE_DTYPES, source, "source dtype")
    header = Header(codec_name, numel, payload, round_, seed, epoch, source_name, value_name,
                    form, bits, tile, flags, crc, major, minor, revision)  # fmt: skip
    RULES[codec_name].header(header)
    need(
        numel <= limits.max_numel,
        f"claims {numel} coordinates, the receiver's limit max_numel is {limits.max_numel}",
    )
    need(
        payload <= limits.max_payload_bytes,
        f"claims a payload of {payload} bytes, the receiver's limit max_payload_bytes is "
        f"{limits.max_payload_bytes}",
    )
    return header


def parse(buffer: bytes, limits: Limits | None = None) -> tuple[Header, Any]:
    """Read a whole packet and check everything in it.

    Order: header, section table and lengths against numel, bits and the codec, checksum, contents.

    Returns
    -------
    header : Header
    body : SparseBody, BucketBody, or what the codec's rules return

    Raises
    ------
    PacketError
        Anything is not as docs/packet.md says; the message names what was expected and what came.
    """
    limits = limits or Limits()
    buffer = bytes(buffer)
    size = len(buffer)
    header = read_header(buffer, limits)
    need(
        size == header.nbytes,
        f"the header says {header.nbytes} bytes, the buffer holds {size}",
    )
    rules = RULES[header.codec]
    elements = {**rules.elements(header), TENSORS: 64}
    words = f"codec {CODECS[header.codec]} ({header.codec})"
    parts = Parts(header, buffer, read_table(buffer, size, elements, words))
    table_offset, table_length = parts.found.get(TENSORS, (size, 0))
    need(
        table_length // 64 <= limits.max_tensors,
        f"{table_length // 64} tensors, the receiver's limit max_tensors is {limits.max_tensors}",
    )
    allowed = 8 * header.numel + SLACK_BYTES + table_length
    need(
        header.payload_bytes <= allowed,
        f"a payload of {header.payload_bytes} bytes for {header.numel} coordinates, "
        f"at most {allowed}",
    )
    rules.lengths(parts)
    if header.flags & FLAG_CHECKSUM:
        crc = crc32c(buffer[HEADER_BYTES:], crc32c(buffer[:60] + bytes(4)))
        need(crc == header.crc, "the checksum of the bytes differs from the header's")
    table = buffer[table_offset : table_offset + table_length]
    return header, rules.contents(parts, tensor_entries(table, header.numel))
