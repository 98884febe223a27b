"""How products with quantized weights are cut into programs: tables by capability, and one rule.

Nothing is timed at the first call. A table has the tiles for each number of rows M, one table for
each compute capability from which on it is meant; `PLANS` is where measurements go. Whatever they
say, a tile of the weight lies within one group of scales, and K (n for the gradient) is split only
where the tiles alone are fewer than `FILL` programs for each multiprocessor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

__all__ = [
    "GEMV_ROWS",
    "PLANS",
    "Device",
    "Plan",
    "Tile",
    "device_of",
    "plan",
    "plan_gemv",
    "plan_int8",
]


class Device(NamedTuple):
    """What a plan depends on."""

    capability: tuple[int, int]
    multiprocessors: int


class Tile(NamedTuple):
    """Tiles for up to `rows` rows: BM rows, BN columns of the result, BK of the contraction."""

    rows: int
    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """Tiles of one call, and over how many programs its contraction is split.

    Attributes
    ----------
    bm, bn, bk : int
        Tile; `bk` of a gemv is in words.
    warps, stages : int
        Of a program.
    steps : int
        Tiles of the contraction one program adds up.
    splits : int
        Programs that share a tile of the result; their sums are joined in order.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    steps: int = 1
    splits: int = 1


FILL = 1  # tiles of the result a multiprocessor should have before the contraction is split
LEAST = 2  # tiles of the contraction that are worth a program
MOST_SPLITS = 32
GEMV_ROWS = 4  # rows of x up to which the gemv runs
FAR = 1 << 62

# The contraction of "dx" is n: its BN are k, BK rows of W. "wide" is for float32 and codebooks,
# whose factors are cut into parts; "int8" multiplies integers, "int8 whole" with one scale a row
# and symmetric activations.
_AMPERE = {
    "gemm": (
        Tile(16, 16, 64, 128, 4, 4),
        Tile(32, 32, 64, 128, 4, 3),
        Tile(64, 64, 64, 64, 4, 3),
        Tile(FAR, 128, 128, 32, 8, 3),
    ),
    "wide": (
        Tile(16, 16, 64, 64, 4, 3),
        Tile(FAR, 64, 64, 32, 4, 3),
    ),
    "dx": (
        Tile(16, 16, 64, 64, 4, 3),
        Tile(32, 32, 64, 64, 4, 3),
        Tile(FAR, 64, 64, 32, 4, 3),
    ),
    "int8": (
        Tile(16, 16, 32, 128, 4, 4),
        Tile(32, 32, 64, 128, 4, 3),
        Tile(64, 64, 64, 128, 4, 3),
        Tile(FAR, 128, 64, 64, 8, 3),
    ),
    "int8 whole": (
        Tile(16, 16, 32, 128, 4, 4),
        Tile(32, 32, 64, 128, 4, 3),
        Tile(64, 64, 64, 128, 4, 3),
        Tile(FAR, 128, 128, 64, 8, 3),
    ),
}


def _staged(tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
    """Return the tiles with four stages, but for the last."""
    return (*(tile._replace(stages=4) for tile in tiles[:-1]), tiles[-1])


PLANS: dict[tuple[int, int], dict[str, tuple[Tile, ...]]] = {
    (8, 0): _AMPERE,
    (9, 0): {
        **_AMPERE,
        "gemm": (*_staged(_AMPERE["gemm"])[:-1], Tile(FAR, 128, 128, 64, 8, 3)),
        "int8": _staged(_AMPERE["int8"]),
        "int8 whole": _staged(_AMPERE["int8 whole"]),
    },
}


def plan(device: Device, kernel: str, m: int, outputs: int, contraction: int, within: int) -> Plan:
    """Return the plan of a product on tensor cores.

    Parameters
    ----------
    device : Device
        Where it runs.
    kernel : {"gemm", "wide", "dx"}
        Row of `PLANS`.
    m, outputs, contraction : int
        Sizes of the result and of the sum.
    within : int
        Positions along k that share a scale, which tiles divide; 0: all of them.
    """
    tile = tile_of(device, kernel, m)
    bn, bk = min(tile.bn, ceil_power(outputs)), min(tile.bk, ceil_power(contraction))
    if kernel == "dx":
        bn = min(bn, divisor(within))
    else:
        bk = min(bk, divisor(within))
    bn, bk = max(16, bn), max(16, bk)
    chosen = Plan(tile.bm, bn, bk, tile.warps, tile.stages)
    tiles = -(-m // tile.bm) * -(-outputs // bn)
    return split(chosen, device, tiles, -(-contraction // bk))


def plan_int8(
    device: Device, m: int, n: int, units: int, unit: int, *, light: bool = False
) -> Plan:
    """Return the plan of a product of integers; `unit`: values with one scale, `units` of them.

    A unit is one tile, part of one, or some: what is beyond it is masked. light: integer sums are
    all a program has to keep, as with one unit and symmetric activations.
    """
    tile = tile_of(device, "int8 whole" if light else "int8", m)
    bn, bk = max(16, min(tile.bn, ceil_power(n))), max(32, min(tile.bk, ceil_power(unit)))
    chosen = Plan(tile.bm, bn, bk, tile.warps, tile.stages)
    return split(chosen, device, -(-m // tile.bm) * -(-n // bn), units)


def tile_of(device: Device, kernel: str, m: int) -> Tile:
    """Return the tiles for m rows, from the table of the newest capability that is not too new."""
    best = max((c for c in PLANS if c <= device.capability), default=min(PLANS))
    return next(t for t in PLANS[best][kernel] if m <= t.rows)


def plan_gemv(device: Device, m: int, n: int, words: int) -> Plan:
    """Return the plan of a gemv for m rows; `words`: of one row of W."""
    warps = 8 if words >= 128 else 4
    bj = max(1, min((16 if m <= 2 else 8) * warps, ceil_power(words)))
    chosen = Plan(m, 16, bj, warps, 2)
    return split(chosen, device, -(-n // 16), -(-words // bj), fill=2, least=1)


def split(
    chosen: Plan, device: Device, tiles: int, steps: int, *, fill: int = FILL, least: int = LEAST
) -> Plan:
    """Return the plan with `steps` of the contraction cut so that the device is filled."""
    wanted = fill * device.multiprocessors // max(1, tiles)
    parts = max(1, min(wanted, steps // least, MOST_SPLITS))
    each = max(1, -(-steps // parts))
    return replace(chosen, steps=each, splits=max(1, -(-steps // each)))


def divisor(within: int) -> int:
    """Return the largest power of two that divides a number; FAR for 0."""
    return within & -within or FAR


def ceil_power(size: int) -> int:
    """Return the smallest power of two that is not less than a number, at least 1."""
    return 1 << max(0, size - 1).bit_length()


@functools.lru_cache(maxsize=16)
def device_of(name: str) -> Device:
    """Return the facts of a device by its name; those of a small one for the interpreter."""
    if not name.startswith("cuda"):
        return Device((8, 0), 4)
    import torch

    found = torch.cuda.get_device_properties(name)
    return Device((found.major, found.minor), found.multi_processor_count)
