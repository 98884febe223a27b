"""Coordinates of sparse packets in few bits: the definition in Python.

Within a tile of 65,536 coordinates the gaps ``i_j - i_{j-1} - 1`` are written, ``i_{-1} = -1``.

- ``bitpack``: a byte for each group of 128 gaps, the bits of its largest gap; then the groups, tile
  after tile, each from a byte on, its gaps little-endian at that width.
- ``rice``: for each tile two bytes (little-endian) that say how many bytes it takes, then for each
  tile a byte, its parameter b; then the tiles. A gap is ``gap >> b`` ones, a zero, and its b low
  bits, most significant bit first. A writer takes the b of fewest bits, the smallest of several.

Pad bits are zero. Source: Rice, "Some practical universal noiseless coding techniques", JPL
publication 79-22, 1979; Golomb, IEEE Trans. Inf. Theory 12(3), 1966.
"""

from __future__ import annotations

import numpy as np

from flcore.reference.wire_frame import TILE, need

__all__ = [
    "CODINGS",
    "GROUP",
    "decode",
    "encode",
    "gaps",
    "rice_bits",
    "rice_code",
    "rice_parameter",
]

CODINGS = {"bitpack": 3, "rice": 4}
GROUP = 128  # gaps that share a width
WIDTH_MAX = 16
PARAMETER_MAX = 15
BYTES_MAX = TILE // 8  # of a Rice-coded tile: parameter 0 never needs more


def gaps(local: np.ndarray) -> np.ndarray:
    """Return the gaps of increasing coordinates, int64 (n,)."""
    return np.diff(np.asarray(local, np.int64), prepend=-1) - 1


def encode(counts: np.ndarray, local: np.ndarray, coding: str) -> bytes:
    """Return the section that holds `local`, the coordinates within their tiles.

    Parameters
    ----------
    counts : (tiles,) integers
        Entries of each tile.
    local : (k,) integers
        Increasing within each tile.
    coding : {"bitpack", "rice"}
    """
    tiles = [gaps(part) for part in np.split(local, np.cumsum(counts)[:-1])] if len(counts) else []
    if coding == "rice":
        parameters = [rice_parameter(g) for g in tiles]
        codes = [_bytes(rice_code(g, b)) for g, b in zip(tiles, parameters, strict=True)]
        lengths = np.array([len(c) for c in codes], "<u2")
        return lengths.tobytes() + bytes(parameters) + b"".join(codes)
    groups = [g[j : j + GROUP] for g in tiles for j in range(0, g.size, GROUP)]
    widths = [int(g.max()).bit_length() for g in groups]
    return bytes(widths) + b"".join(_pack(g, w) for g, w in zip(groups, widths, strict=True))


def decode(section: bytes, counts: np.ndarray, numel: int, coding: str) -> np.ndarray:
    """Return the coordinates within their tiles, int64 (k,), and check every bit of the section.

    Raises
    ------
    PacketError
        The section is not one that `encode` could write, but for the choice of Rice parameters.
    """
    counts = np.asarray(counts, np.int64)
    tiles = counts.size
    head = 3 * tiles if coding == "rice" else int((-(-counts // GROUP)).sum())
    size = len(section)
    need(size >= head, f"indices: expected at least {head} bytes for {tiles} tiles, got {size}")
    parts = _split_rice(section, counts) if coding == "rice" else _split_bitpack(section, counts)
    want = head + sum(parts_bytes for _, parts_bytes in parts)
    need(size == want, f"indices: expected {want} bytes, got {size}")
    local, at = [np.empty(0, np.int64)], head
    for t, (parameters, length) in enumerate(parts):
        read = _read_rice if coding == "rice" else _read_bitpack
        g = read(section[at : at + length], parameters, int(counts[t]), t)
        tile = np.cumsum(g + 1) - 1
        need(
            not tile.size or tile[-1] < min(TILE, numel - t * TILE),
            f"indices of tile {t}: a coordinate beyond the tile",
        )
        local.append(tile)
        at += length
    return np.concatenate(local)


# ---- bitpack ---------------------------------------------------------------------------------


def _pack(g: np.ndarray, width: int) -> bytes:
    bits = (g[:, None] >> np.arange(width)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def _split_bitpack(section: bytes, counts: np.ndarray) -> list[tuple[bytes, int]]:
    parts, at = [], 0
    for t, count in enumerate(counts):
        sizes = [min(GROUP, int(count) - j) for j in range(0, int(count), GROUP)]
        widths = section[at : at + len(sizes)]
        for width in widths:
            need(
                width <= WIDTH_MAX,
                f"indices of tile {t}: expected a width of at most {WIDTH_MAX} bits, got {width}",
            )
        length = sum((n * w + 7) // 8 for n, w in zip(sizes, widths, strict=True))
        parts.append((widths, length))
        at += len(sizes)
    return parts


def _read_bitpack(data: bytes, widths: bytes, count: int, tile: int) -> np.ndarray:
    found, at = [np.empty(0, np.int64)], 0
    for group, width in enumerate(widths):
        n = min(GROUP, count - group * GROUP)
        length = (n * width + 7) // 8
        bits = np.unpackbits(np.frombuffer(data, np.uint8, length, at), bitorder="little")
        need(not bits[n * width :].any(), f"indices of tile {tile}: a pad bit is set")
        values = bits[: n * width].reshape(n, width).astype(np.int64)
        g = (values << np.arange(width)).sum(axis=1)
        need(
            int(g.max()).bit_length() == width,
            f"indices of tile {tile}: a width larger than its gaps need",
        )
        found.append(g)
        at += length
    return np.concatenate(found)


# ---- rice ------------------------------------------------------------------------------------


def rice_bits(g: np.ndarray, b: int) -> int:
    """Return the bits of the gaps `g` with parameter `b`."""
    return int(g.size * (1 + b) + (g >> b).sum())


def rice_parameter(g: np.ndarray) -> int:
    """Return the parameter of fewest bits, the smallest of several; 0 without gaps."""
    return int(np.argmin([rice_bits(g, b) for b in range(PARAMETER_MAX + 1)]))


def rice_code(g: np.ndarray, b: int) -> str:
    """Return the code of the gaps `g` as a string of "0" and "1"."""
    low = [format(int(x) & ((1 << b) - 1), f"0{b}b") if b else "" for x in g]
    return "".join("1" * (int(x) >> b) + "0" + y for x, y in zip(g, low, strict=True))


def _bytes(bits: str) -> bytes:
    size = (len(bits) + 7) // 8
    return int(bits.ljust(8 * size, "0"), 2).to_bytes(size, "big") if bits else b""


def _split_rice(section: bytes, counts: np.ndarray) -> list[tuple[bytes, int]]:
    lengths = np.frombuffer(section, "<u2", counts.size).tolist()
    parameters = section[2 * counts.size : 3 * counts.size]
    for t, (length, parameter) in enumerate(zip(lengths, parameters, strict=True)):
        need(
            length <= BYTES_MAX,
            f"indices of tile {t}: expected at most {BYTES_MAX} bytes, got {length}",
        )
        need(
            parameter <= PARAMETER_MAX,
            f"indices of tile {t}: expected a parameter of at most {PARAMETER_MAX}, "
            f"got {parameter}",
        )
        need(
            parameter == 0 or counts[t] > 0,
            f"indices of tile {t}: a parameter without entries",
        )
    return [(parameters[t : t + 1], length) for t, length in enumerate(lengths)]


def _read_rice(data: bytes, parameters: bytes, count: int, tile: int) -> np.ndarray:
    b, at, found = parameters[0], 0, []
    bits = format(int.from_bytes(data, "big"), f"0{8 * len(data)}b") if data else ""
    for _ in range(count):
        end = bits.find("0", at)
        if end < 0 or end + 1 + b > len(bits):
            at = len(bits) + 8  # the codes run out of bytes
            break
        low = bits[end + 1 : end + 1 + b]
        found.append(((end - at) << b) + (int(low, 2) if b else 0))
        at = end + 1 + b
    need((at + 7) // 8 == len(data), f"indices of tile {tile}: the codes do not end with its bytes")
    need("1" not in bits[at:], f"indices of tile {tile}: a pad bit is set")
    return np.array(found, np.int64)
