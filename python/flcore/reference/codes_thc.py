"""THC codes, which a server can add as integers: the definition in NumPy.

All clients share the signs S of the rotation, the norms l of the blocks (the largest of all
clients'), the clip t and a table T of 2**b integers from 0 to g::

    z = m**-1/2 Had(S x)      p = (z m**1/2 / l) g / (2 t) + g / 2, cut to 0 .. g
    code j or j + 1 where T_j <= p < T_{j+1}, at random so that the mean of T is p
    D = S Had(2 T - g) t l / (g m)

With one norm for all blocks, ``l (d / m)**-1/2`` takes the place of l. ``Had(2 T - g)`` is a vector
of integers, so the mean of D over clients is one transform of the sum of their T.

Li et al., "THC: Accelerating Distributed Deep Learning Using Tensor Homomorphic Compression",
NSDI 2024, arXiv 2302.08545.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from flcore._state import State
from flcore.reference import buckets, feedback, rng, streams, wire, wire_writer
from flcore.reference.hadamard import flip, hadamard, padded, signs
from flcore.reference.wire_frame import CODEBOOK, CODES, NORM, Header
from flcore.reference.wire_thc import ThcBody, code_count

__all__ = [
    "Grid",
    "block_squares",
    "clip_of",
    "decode",
    "decode_update",
    "down",
    "encode_update",
    "grid_table",
    "quantize",
]


class Grid(NamedTuple):
    """What clients share: ``norms`` float32, one a block or one alone (`shared`), t and T."""

    norms: np.ndarray
    shared: bool
    clip: np.float32
    table: np.ndarray


# ---- the grid ----------------------------------------------------------------------------------


def clip_of(share: float) -> float:
    """Return t so that a standard normal number lies outside -t .. t with probability `share`.

    A multiple of 2**-12, so that no mathematical library has its own opinion of the last digit.
    """
    return round(NormalDist().inv_cdf(1 - share / 2) * 4096) / 4096


def grid_table(bits: int, g: int, clip: float) -> tuple[int, ...]:
    """Return the table T with the least error for normal numbers cut at `clip`.

    Rounding y between neighbours a and b at random has variance (y - a) (b - y); the table is the
    path from 0 to g with the least sum of its integrals over the normal density, found by dynamic
    programming over the lower half, which the upper half mirrors. With ``g = 2**bits - 1`` it is
    0, 1 .. g.
    """
    normal, half = NormalDist(), 1 << (bits - 1)
    at = [2 * clip / g * (i - g / 2) for i in range(g + 1)]
    below, density = [normal.cdf(x) for x in at], [normal.pdf(x) for x in at]

    def error(i: int, j: int) -> float:
        a, b = at[i], at[j]
        mass, first = below[j] - below[i], density[i] - density[j]
        second = mass + a * density[i] - b * density[j]
        return (a + b) * first - second - a * b * mass

    paths: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for k in range(1, half):
        paths = {
            j: min((cost + error(i, j), (*path, j)) for i, (cost, path) in paths.items() if i < j)
            for j in range(k, (g - 1) // 2 + 1)
        }
    lower = min((2 * cost + error(i, g - i), path) for i, (cost, path) in paths.items())[1]
    return (*lower, *(g - x for x in reversed(lower)))


def _root(m: int, total: int) -> float:
    return float(np.sqrt(np.float64(total) / np.float64(m)))


def down(l: np.float32, clip: np.float32, g: int, m: int, total: int) -> float:  # noqa: E741
    """Return what makes D out of the transform of 2 T - g, in float64."""
    return float(clip) * float(l) / (float(g) * float(m) * _root(m, total))


# ---- one block after another -------------------------------------------------------------------


def _blocks(numel: int, block: int) -> list[tuple[slice, int]]:
    """Return the coordinates of each block and what it is filled up to."""
    parts = [slice(at, min(at + block, numel)) for at in range(0, numel, block)]
    return [(part, padded(part.stop - part.start)) for part in parts]


def block_squares(u: np.ndarray, block: int) -> np.ndarray:
    """Return ``sum u u`` of every block, float64: 16 lanes in order, then a fixed tree."""
    out = np.empty(-(-u.size // block))
    for i, (part, _) in enumerate(_blocks(u.size, block)):
        x = u[part].astype(np.float64)
        rows = np.zeros(-(-x.size // 16) * 16)
        rows[: x.size] = x * x
        lanes = np.zeros(16)
        for row in rows.reshape(-1, 16):
            lanes = lanes + row
        for width in (8, 4, 2, 1):
            lanes = lanes[:width] + lanes[width : 2 * width]
        out[i] = lanes[0]
    return out


def _halves(first: int, count: int, seed: int, round: int, client: int) -> np.ndarray:
    words = rng.random_bits(
        -(-count // 2),
        seed,
        round=round & 0xFFFFFFFF,
        tensor=streams.ROUNDING,
        client=client,
        offset=first // 2,
    )
    return words.astype("<u4").view("<u2")[:count]


def encode_update(
    u: np.ndarray, grid: Grid, bits: int, block: int, *, seed: int, round: int, client: int
) -> np.ndarray:
    """Return the codes of u, finite float32 (d,), one a byte, the last block filled up."""
    codes = np.zeros(code_count(u.size, block), np.uint8)
    table, at = grid.table.astype(np.float32), 0
    g = int(grid.table[-1])
    for i, (part, m) in enumerate(_blocks(u.size, block)):
        length = grid.norms[0 if grid.shared else i]
        here = slice(at, at + m)
        at += m
        if length == 0:
            continue
        x = np.zeros(m, np.float32)
        x[: part.stop - part.start] = u[part]
        exponent = int(np.abs(x).view(np.uint32).max() >> 23)
        power = min(max(254 - exponent, 1), 253)
        x = x * np.float32(2.0 ** (power - 127))
        z = hadamard(flip(x, signs(part.start, m, seed, round)))
        root = _root(m, u.size if grid.shared else m)
        reach = float(grid.clip) * float(length)
        up = float(g) * root / (2.0 * reach * 2.0 ** (power - 127))
        p = z * np.float32(min(up, 2.0**100)) + np.float32(0.5 * g)
        p = np.minimum(np.maximum(p, np.float32(0)), np.float32(g))
        code = np.zeros(m, np.int64)
        for bound in table[1:-1]:
            code += p >= bound
        low, high = table[code], table[code + 1]
        r = buckets.fractions(_halves(part.start, m, seed, round, client))
        codes[here] = code + (r * (high - low) < p - low)
    return codes


def decode(
    values: np.ndarray, grid: Grid, numel: int, block: int, total: int, *, seed: int, round: int
) -> np.ndarray:
    """Return the mean that sums of table values stand for, float32 (d,).

    Parameters
    ----------
    values : (codes,) integers
        ``sum_i w_i T(code_i)`` of every coordinate, the last block filled up.
    total : int
        Sum of the weights w.
    """
    out, at, g = np.zeros(numel, np.float32), 0, int(grid.table[-1])
    for i, (part, m) in enumerate(_blocks(numel, block)):
        length = grid.norms[0 if grid.shared else i]
        y = hadamard(2 * values[at : at + m].astype(np.int64) - total * g)
        at += m
        if length == 0:
            continue
        factor = down(length, grid.clip, g, m, numel if grid.shared else m) / float(total)
        d = flip(np.float32(factor) * y.astype(np.float32), signs(part.start, m, seed, round))
        out[part] = d[: part.stop - part.start]
    return out


def decode_update(h: Header, body: ThcBody) -> np.ndarray:
    """Return what a THC packet stands for, float32 (d,)."""
    count = code_count(h.numel, h.tile)
    codes = buckets.unpack(body.codes, count, h.bits, max(count, 1))
    grid = Grid(body.norms, h.form == 1, body.clip, body.table)
    return decode(body.table[codes], grid, h.numel, h.tile, 1, seed=h.seed, round=h.round)


def quantize(
    g: np.ndarray,
    grid: Grid,
    *,
    bits: int,
    block: int,
    state: State | None = None,
    seed: int = 0,
    round: int = 0,
    client: int = 0,
    **fields: Any,
) -> bytes | None:
    """Return the packet of the update g, float32 (d,), and move the state on.

    None, with nothing changed, where t or u of the affine form is not finite.
    """
    form = feedback.form(g, state or State())
    if not form.finite:
        return None
    codes = encode_update(form.u, grid, bits, block, seed=seed, round=round, client=client)
    numbers = np.concatenate([[grid.clip], grid.norms]).astype("<f4")
    packet = wire_writer.frame(
        [
            (NORM, 4, numbers.tobytes()),
            (CODEBOOK, 2, grid.table.astype("<u2").tobytes()),
            (CODES, 1, buckets.pack(codes, bits, max(codes.size, 1))),
        ],
        codec="thc",
        numel=g.size,
        values="float32",
        form=int(grid.shared),
        bits=bits,
        tile=block,
        seed=seed,
        round=round,
        **fields,
    )
    if state is not None:
        feedback.store(state, form, decode_update(*wire.parse(packet)), seed, round)
    return packet
