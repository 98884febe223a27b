"""Weights of 2, 3, 4 and 8 bits: layouts, what a code stands for, quantisers; the definition.

A weight W (n, k) is stored as unsigned codes q in 0 .. 2^b - 1 and one scale S for `group`
consecutive k of a row (G = ceil(k / group) groups, the last one may be short):

==============  ===================================  ======================================
kind            value                                zeros
==============  ===================================  ======================================
INT             (q - Z) S                            uint8; none: Z = 2^(b - 1)
FLOAT_ZERO      (q - 2^(b - 1)) S + zero             as the scales
TABLE           table[q] S                           none (b = 4, 16 levels)
E4M3, E5M2      fp8(q) S                             none (b = 8, q is the byte)
==============  ===================================  ======================================

Layout "rows", for storage: a row of W is a row of bytes. 8 bits: one byte a code; 4 bits: even k in
the low nibble; 2 bits: k % 4 at bits 2 (k % 4) of byte k // 4; 3 bits: the two low bits as a row of
2 bits, then the high bits, k % 8 of byte k // 8. Bits beyond k are 0.

Layout "tile16", for products: blocks of 16 rows, chunks of 32 k, both padded; a chunk of a block
has 64 b bytes, in vectors of 64 bytes whose byte 4 r + i belongs to row r:

* 8 bits: vector v holds k = 4 v + i;
* 4 bits: vector v holds 8 v + i in the low and 8 v + 4 + i in the high nibble;
* 2 bits: vector v holds 16 v + 4 t + i at bits 2 t, 2 t + 1;
* 3 bits: two vectors of the two low bits, then one with the high bit of 4 t + i at bit t.

Scales and zeros of that layout have the shape (blocks, G, 16); a padded row has scale 0.
"""

from __future__ import annotations

import numpy as np

from flcore.reference.codes_float import NF4, code_values

__all__ = [
    "BITS",
    "CHUNK",
    "CODEBOOKS",
    "E4M3",
    "E5M2",
    "FLOAT_ZERO",
    "INT",
    "ROWS",
    "TABLE",
    "code_levels",
    "dequantize",
    "groups",
    "pack_rows",
    "pack_tile16",
    "row_bytes",
    "spread",
    "tile_groups",
    "unpack_rows",
    "unpack_tile16",
    "untile_groups",
]

BITS = (2, 3, 4, 8)
ROWS, CHUNK = 16, 32  # of a tile: rows of a block and k of a chunk
INT, FLOAT_ZERO, TABLE, E4M3, E5M2 = range(5)  # QWeightKind in csrc/api.h

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], np.float32)

# The levels of the 16 codes. "fp4" has the order that bitsandbytes gives its codes, not that of
# the bits of a floating-point number; "e2m1" is the element format of MXFP4 and NVFP4.
CODEBOOKS = {
    "nf4": NF4,
    "fp4": np.concatenate([_FP4, -_FP4]),
    "e2m1": np.concatenate([_E2M1, -_E2M1]),
}


def groups(k: int, group: int) -> int:
    """Return the number of groups of `group` positions in a row of `k`."""
    return -(-k // group)


def row_bytes(k: int, bits: int) -> int:
    """Return the bytes of a row of `k` codes in the layout "rows"."""
    if bits == 3:
        return -(-k // 4) + -(-k // 8)
    return -(-k * bits // 8)


# ---- layout "rows" -------------------------------------------------------------------------------


def _pack_fields(q: np.ndarray, bits: int) -> np.ndarray:
    """Pack fields of 1, 2, 4 or 8 bits along the last axis, the first one lowest."""
    per = 8 // bits
    padded = np.zeros((*q.shape[:-1], -(-q.shape[-1] // per) * per), np.uint8)
    padded[..., : q.shape[-1]] = q
    fields = padded.reshape(*q.shape[:-1], padded.shape[-1] // per, per)
    shifts = np.arange(per, dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(fields << shifts, axis=-1)


def _unpack_fields(codes: np.ndarray, k: int, bits: int) -> np.ndarray:
    per = 8 // bits
    shifts = np.arange(per, dtype=np.uint8) * np.uint8(bits)
    fields = (codes[..., None] >> shifts) & np.uint8(2**bits - 1)
    return fields.reshape(*codes.shape[:-1], codes.shape[-1] * per)[..., :k]


def pack_rows(q: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes (n, k) uint8 into (n, row_bytes(k, bits)) uint8."""
    if bits == 3:
        return np.concatenate([_pack_fields(q & 3, 2), _pack_fields(q >> 2, 1)], axis=-1)
    return _pack_fields(q, bits)


def unpack_rows(codes: np.ndarray, k: int, bits: int) -> np.ndarray:
    """Return the codes (n, k) uint8 of bytes (n, row_bytes(k, bits))."""
    if bits == 3:
        low = -(-k // 4)
        high = _unpack_fields(codes[..., low:], k, 1)
        return _unpack_fields(codes[..., :low], k, 2) | (high << np.uint8(2))
    return _unpack_fields(codes, k, bits)


# ---- layout "tile16" -----------------------------------------------------------------------------


def _tiles(q: np.ndarray, bits: int) -> np.ndarray:
    """Pack chunks (.., row 16, k 32) of fields of 1, 2, 4 or 8 bits into (.., 64 bits) bytes."""
    per = 8 // bits
    # k = (vector, field t, byte i): the bytes of a vector are ordered row, i
    parts = q.reshape(*q.shape[:-1], CHUNK // (4 * per), per, 4)
    parts = np.moveaxis(parts, -4, -2)  # (.., vector, t, row, i)
    shifts = (np.arange(per, dtype=np.uint8) * np.uint8(bits))[:, None, None]
    packed = np.bitwise_or.reduce(parts << shifts, axis=-3)
    return packed.reshape(*q.shape[:-2], 64 * bits)


def _untile(codes: np.ndarray, bits: int) -> np.ndarray:
    per = 8 // bits
    shape = codes.shape[:-1]
    packed = codes.reshape(*shape, CHUNK // (4 * per), 1, ROWS, 4)
    shifts = (np.arange(per, dtype=np.uint8) * np.uint8(bits))[:, None, None]
    parts = (packed >> shifts) & np.uint8(2**bits - 1)  # (.., vector, t, row, i)
    return np.moveaxis(parts, -2, -4).reshape(*shape, ROWS, CHUNK)


def pack_tile16(q: np.ndarray, bits: int, pad: int = 0) -> np.ndarray:
    """Pack codes (n, k) uint8 into (blocks, chunks, 64 bits) uint8; padding has the code `pad`."""
    n, k = q.shape
    blocks, chunks = -(-n // ROWS), -(-k // CHUNK)
    padded = np.full((blocks * ROWS, chunks * CHUNK), pad, np.uint8)
    padded[:n, :k] = q
    tiles = padded.reshape(blocks, ROWS, chunks, CHUNK).swapaxes(1, 2)
    if bits == 3:
        return np.concatenate([_tiles(tiles & 3, 2), _tiles(tiles >> 2, 1)], axis=-1)
    return _tiles(tiles, bits)


def unpack_tile16(codes: np.ndarray, n: int, k: int, bits: int) -> np.ndarray:
    """Return the codes (n, k) uint8 of tiles (blocks, chunks, 64 bits)."""
    if bits == 3:
        tiles = _untile(codes[..., :128], 2) | (_untile(codes[..., 128:], 1) << np.uint8(2))
    else:
        tiles = _untile(codes, bits)
    blocks, chunks = tiles.shape[:2]
    return tiles.swapaxes(1, 2).reshape(blocks * ROWS, chunks * CHUNK)[:n, :k].copy()


def tile_groups(values: np.ndarray) -> np.ndarray:
    """Order scales or zeros (n, G) as (blocks, G, 16); padded rows are 0."""
    n, count = values.shape
    blocks = -(-n // ROWS)
    padded = np.zeros((blocks * ROWS, count), values.dtype)
    padded[:n] = values
    return np.ascontiguousarray(padded.reshape(blocks, ROWS, count).swapaxes(1, 2))


def untile_groups(values: np.ndarray, n: int) -> np.ndarray:
    """Undo `tile_groups`; returns (n, G)."""
    blocks, count, _ = values.shape
    return np.ascontiguousarray(values.swapaxes(1, 2).reshape(blocks * ROWS, count)[:n])


# ---- what codes stand for ------------------------------------------------------------------------


def code_levels(bits: int, kind: int, table: np.ndarray | None = None) -> np.ndarray:
    """Return what each of the 2^bits codes stands for at scale 1 and zero 0; float64."""
    if kind == TABLE:
        assert table is not None
        return np.asarray(table, np.float64)
    if kind in (E4M3, E5M2):
        return code_values("e4m3" if kind == E4M3 else "e5m2").astype(np.float64)
    return np.arange(2**bits) - (0.0 if kind == INT else 2.0 ** (bits - 1))


def spread(values: np.ndarray, k: int, group: int) -> np.ndarray:
    """Repeat group values (n, G) along the rows; returns (n, k)."""
    return np.repeat(values, group, axis=1)[:, :k]


def dequantize(
    q: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    *,
    bits: int,
    kind: int,
    group: int,
    table: np.ndarray | None = None,
    to_odd: bool = False,
) -> np.ndarray:
    """Return the weight that codes (n, k) stand for, in float64.

    Exact, up to one rounding to float64 of the sum of FLOAT_ZERO: to nearest, or to odd, after
    which rounding to float32 gives the float32 number nearest to the exact sum. `scales` and
    floating `zeros` are (n, G) arrays of numbers, not the bits of bfloat16.
    """
    k = q.shape[1]
    levels = code_levels(bits, kind, table)[q]
    if kind == INT:
        offset = np.full(scales.shape, 2.0 ** (bits - 1)) if zeros is None else zeros
        levels = levels - spread(offset.astype(np.float64), k, group)
    values = levels * spread(scales.astype(np.float64), k, group)
    if kind == FLOAT_ZERO:
        assert zeros is not None
        product, zero = values, spread(zeros.astype(np.float64), k, group)
        values = product + zero
        if to_odd:
            back = values - product
            error = (product - (values - back)) + (zero - back)  # Knuth's two-sum
            even = np.ascontiguousarray(values).view(np.uint64) % 2 == 0
            beside = np.nextafter(values, np.copysign(np.inf, error))
            values = np.where((error != 0) & even, beside, values)
    return values
