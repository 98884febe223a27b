"""Sketch packets: one float32 table of `form` rows and `tile` columns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flcore.reference.wire_frame import (
    VALUE_CODES,
    VALUES,
    Header,
    Parts,
    Rules,
    TensorEntry,
    all_finite,
    need,
)

__all__ = ["MAX_NUMEL", "MAX_ROWS", "RULES", "SketchBody"]

MAX_ROWS = 9
MAX_NUMEL = 2**34  # words of one stream of random numbers


class SketchBody(NamedTuple):
    """Contents of a sketch packet, checked: ``table`` float32 (rows, columns)."""

    table: np.ndarray
    tensors: tuple[TensorEntry, ...]


def _check_header(h: Header) -> None:
    need(
        h.value_dtype == "float32",
        f"value dtype: expected 1 (float32), got {VALUE_CODES[h.value_dtype]}",
    )
    need(
        h.form % 2 == 1 and h.form <= MAX_ROWS,
        f"expected 1, 3, 5, 7 or 9 rows, got {h.form}",
    )
    need(h.bits == 32, f"expected 32 bits a value, got {h.bits}")
    need(h.tile >= 1, "expected at least one column")
    need(h.numel <= MAX_NUMEL, f"claims {h.numel} coordinates, a sketch has at most 2^34")


def _elements(h: Header) -> dict[int, int]:
    return {VALUES: 4}


def _check_lengths(parts: Parts) -> None:
    h = parts.header
    want, got = 4 * h.form * h.tile, parts.need(VALUES, "table")
    need(
        got == want,
        f"section type 5: expected {want} bytes for {h.form} rows of {h.tile} columns, got {got}",
    )


def _contents(parts: Parts, tensors: tuple[TensorEntry, ...]) -> SketchBody:
    raw = parts.view(VALUES, "<u4")
    need(all_finite(raw, 1), "a value is not finite")
    return SketchBody(raw.view("<f4").reshape(parts.header.form, parts.header.tile), tensors)


RULES = Rules(_check_header, _elements, _check_lengths, _contents)
