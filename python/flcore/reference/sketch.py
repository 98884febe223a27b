"""Count sketches: the definition in NumPy.

A table of `rows` x `columns` cells. Word j of the random stream (seed, round 0, tensor `SKETCH`,
client = row) says where coordinate j goes in a row: bit 0 is the sign (1 = minus), the other 31
bits times `columns` over 2**31 the column. So hashes need no tables, are the same everywhere, and
are as independent as the generator.

Charikar, Chen, Farach-Colton, "Finding frequent items in data streams", ICALP 2002; Rothchild et
al., "FetchSGD", ICML 2020, arXiv 2007.07682.
"""

from __future__ import annotations

import numpy as np

from flcore.reference import rng, streams
from flcore.reference.sparsify import select
from flcore.reference.wire_frame import Header
from flcore.reference.wire_sketch import SketchBody

__all__ = [
    "BLOCK",
    "decode",
    "estimate",
    "medians",
    "parts",
    "places",
    "scatter",
    "sketch",
    "top_k",
]

BLOCK = 1024  # coordinates; parts are runs of blocks


def places(index: np.ndarray, seed: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return column (int64) and sign (float32, -1 or 1) of coordinates `index`, each (rows, n)."""
    index = np.asarray(index, np.int64)
    words = np.empty((rows, index.size), np.uint32)
    for row in range(rows):
        block = np.stack(
            rng.philox4x32_10(index >> 2, streams.SKETCH, 0, row, seed & 0xFFFFFFFF, seed >> 32)
        )
        words[row] = block[index & 3, np.arange(index.size)]
    column = (words >> np.uint32(1)).astype(np.uint64) * np.uint64(columns) >> np.uint64(31)
    return column.astype(np.int64), np.where(words & 1, np.float32(-1), np.float32(1))


def parts(numel: int, columns: int) -> int:
    """Return in how many parts the coordinates are added up: cells get some 4 values of each."""
    return min(8, max(1, numel // (4 * columns)))


def sketch(u: np.ndarray, seed: int, rows: int, columns: int) -> np.ndarray:
    """Return the sketch of `u`, float32 (d,), as float32 (rows, columns).

    Within a part of the coordinates a cell takes its values one after the other, in float32; the
    parts are then added in order.
    """
    column, sign = places(np.arange(u.size), seed, rows, columns)
    blocks, pieces = -(-u.size // BLOCK), parts(u.size, columns)
    total = np.zeros((rows, columns), np.float32)
    for part in range(pieces):
        first, last = (blocks * p // pieces * BLOCK for p in (part, part + 1))
        cells = np.zeros((rows, columns), np.float32)
        for row in range(rows):
            here = slice(first, min(last, u.size))
            np.add.at(cells[row], column[row, here], sign[row, here] * u[here])
        total = cells if part == 0 else total + cells
    return total


def medians(estimates: np.ndarray) -> np.ndarray:
    """Return the median of each column of (rows, n); zeros are +0."""
    return np.sort(estimates, axis=0)[estimates.shape[0] // 2] + np.float32(0)


def estimate(cells: np.ndarray, index: np.ndarray, seed: int) -> np.ndarray:
    """Return what the table, float32 (rows, columns), says about coordinates `index`, float32."""
    rows, columns = cells.shape
    column, sign = places(index, seed, rows, columns)
    return medians(sign * np.take_along_axis(cells, column, axis=1))


def decode(header: Header, body: SketchBody) -> np.ndarray:
    """Return what the table of a checked packet says about all coordinates, float32 (d,)."""
    return estimate(body.table, np.arange(header.numel), header.seed)


def top_k(cells: np.ndarray, numel: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices (int64, increasing) and values of the k largest estimates of `numel`.

    Larger magnitude first, then smaller index.
    """
    values = estimate(cells, np.arange(numel), seed)
    index = select(values, k)
    return index, values[index]


def scatter(cells: np.ndarray, index: np.ndarray, values: np.ndarray | None, seed: int) -> None:
    """Add ``sign * values`` to the cells of coordinates `index`, in order; None sets them to 0."""
    rows, columns = cells.shape
    column, sign = places(index, seed, rows, columns)
    for row in range(rows):
        if values is None:
            cells[row, column[row]] = 0
        else:
            np.add.at(cells[row], column[row], sign[row] * values)
