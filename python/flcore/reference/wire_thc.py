"""THC packets: codes of a table that all clients share, the table, and the norms they agreed on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flcore.reference.hadamard import padded
from flcore.reference.wire_frame import (
    CODEBOOK,
    CODES,
    NORM,
    Header,
    Parts,
    Rules,
    TensorEntry,
    need,
)

__all__ = [
    "LARGEST_CLIP",
    "LARGEST_NORM",
    "LARGEST_TABLE",
    "RULES",
    "SMALLEST_CLIP",
    "ThcBody",
    "code_count",
    "norm_count",
]

BLOCKS = (256, 512, 1024, 2048, 4096)
SMALLEST_CLIP, LARGEST_CLIP = 2.0**-10, 16.0
LARGEST_NORM = 2.0**120
"""Decoded values are at most twice clip times norm."""
LARGEST_TABLE = 255


class ThcBody(NamedTuple):
    """Contents of a THC packet, checked.

    ``norms`` float32, one a block, or one alone; ``clip`` float32; ``table`` uint16 (2**bits,);
    ``codes`` uint8, packed as on the wire.
    """

    norms: np.ndarray
    clip: np.float32
    table: np.ndarray
    codes: np.ndarray
    tensors: tuple[TensorEntry, ...]


def code_count(numel: int, block: int) -> int:
    """Return the codes of `numel` coordinates: the last block is filled up to a power of two."""
    whole, rest = divmod(numel, block)
    return whole * block + (padded(rest) if rest else 0)


def norm_count(numel: int, block: int, form: int) -> int:
    """Return how many norms a packet has: one, or one a block."""
    return 1 if form else -(-numel // block)


def _check_header(h: Header) -> None:
    need(h.value_dtype == "float32", "value dtype is not one that thc packets have")
    need(h.form <= 1, f"form {h.form} is not one that thc packets have")
    need(h.bits in (2, 4), f"{h.bits} bits a code are not what a thc packet has")
    need(
        h.tile in BLOCKS,
        f"expected blocks of a power of two from 256 to 4096, got {h.tile}",
    )


def _elements(h: Header) -> dict[int, int]:
    return {CODES: 1, CODEBOOK: 2, NORM: 4}


def _check_lengths(parts: Parts) -> None:
    h = parts.header
    for kind, what, want in (
        (NORM, "norm", 4 + 4 * norm_count(h.numel, h.tile, h.form)),
        (CODEBOOK, "codebook", 2 << h.bits),
        (CODES, "codes", -(-code_count(h.numel, h.tile) * h.bits // 8)),
    ):
        got = parts.need(kind, what)
        need(got == want, f"section type {kind}: expected {want} bytes, got {got}")


def _contents(parts: Parts, tensors: tuple[TensorEntry, ...]) -> ThcBody:
    h = parts.header
    numbers = parts.view(NORM, "<f4")
    clip, norms = numbers[0], numbers[1:]
    need(bool(SMALLEST_CLIP <= clip <= LARGEST_CLIP), "clip: expected 2^-10 to 16")
    good = ~np.signbit(norms) & (norms <= LARGEST_NORM)
    bad = int(np.argmin(good)) if good.size else 0
    need(bool(good.all()), f"norm {bad}: it is negative, not finite, or too large")
    table = parts.view(CODEBOOK, "<u2")
    t = table.astype(np.int64)
    need(
        t[0] == 0 and t[-1] <= LARGEST_TABLE,
        f"codebook: expected values from 0 to at most {LARGEST_TABLE}",
    )
    need(bool(np.all(np.diff(t) > 0)), "codebook: a value is not above the one before")
    need(bool(np.all(t + t[::-1] == t[-1])), "codebook: a value has no mirror image")
    codes = parts.view(CODES, "u1")
    used = code_count(h.numel, h.tile) * h.bits % 8
    need(used == 0 or codes[-1] >> used == 0, "a bit after the last code is set")
    return ThcBody(norms, clip, table, codes, tensors)


RULES = Rules(_check_header, _elements, _check_lengths, _contents)
