"""Low-rank packets: for each tensor a rank, and then its factors, or its values at rank 0."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flcore.reference.wire_frame import (
    COUNTS,
    FACTOR_P,
    FACTOR_Q,
    TENSOR_BYTES,
    TENSORS,
    VALUE_BYTES,
    VALUE_CODES,
    VALUES,
    Header,
    Parts,
    Rules,
    TensorEntry,
    all_finite,
    decode_values,
    need,
)

__all__ = ["LARGEST", "MAX_RANK", "RULES", "LowRankBody"]

MAX_RANK = 32
LARGEST = 3.4e38  # what the product of two factors may reach


class LowRankBody(NamedTuple):
    """Contents of a low-rank packet, checked.

    ``ranks`` int64, one a tensor; ``p``, ``q``, ``values`` float32: P (n, rank) and Q^T (rank, m)
    of each tensor of a rank, the values of the others, tensor after tensor.
    """

    ranks: np.ndarray
    p: np.ndarray
    q: np.ndarray
    values: np.ndarray
    tensors: tuple[TensorEntry, ...]


def _check_header(h: Header) -> None:
    need(
        h.value_dtype in ("float32", "bfloat16"),
        f"value dtype: expected 1 (float32) or 3 (bfloat16), got {VALUE_CODES[h.value_dtype]}",
    )
    need(h.form == 0, f"form {h.form} is not one that low_rank packets have")
    bits = 8 * VALUE_BYTES[VALUE_CODES[h.value_dtype]]
    need(h.bits == bits, f"expected {bits} bits a value, got {h.bits}")
    need(1 <= h.tile <= MAX_RANK, f"expected a rank of 1 to {MAX_RANK}, got {h.tile}")


def _elements(h: Header) -> dict[int, int]:
    size = VALUE_BYTES[VALUE_CODES[h.value_dtype]]
    return {COUNTS: 4, VALUES: size, FACTOR_P: size, FACTOR_Q: size}


def _check_lengths(parts: Parts) -> None:
    tensors = parts.length(TENSORS) // TENSOR_BYTES
    need(parts.header.numel == 0 or tensors > 0, "section type 9 (tensor table) is missing")
    got = parts.need(COUNTS, "ranks")
    need(
        got == 4 * tensors,
        f"section type 3: expected {4 * tensors} bytes for {tensors} tensors, got {got}",
    )
    for kind, what in ((VALUES, "values"), (FACTOR_P, "P"), (FACTOR_Q, "Q")):
        parts.need(kind, what)


def _sides(tensor: TensorEntry) -> tuple[int, int]:
    """Return the rows and columns of a tensor as a matrix."""
    count = int(np.prod(tensor.shape, dtype=object))
    return tensor.shape[0], count // tensor.shape[0]


def _contents(parts: Parts, tensors: tuple[TensorEntry, ...]) -> LowRankBody:
    h = parts.header
    ranks = parts.view(COUNTS, "<u4").astype(np.int64)
    want = {VALUES: 0, FACTOR_P: 0, FACTOR_Q: 0}
    for i, (tensor, rank) in enumerate(zip(tensors, ranks.tolist(), strict=True)):
        if rank == 0:
            want[VALUES] += int(np.prod(tensor.shape, dtype=object))
            continue
        need(
            len(tensor.shape) >= 2 and 0 not in tensor.shape,
            f"tensor {i}: of rank {rank} but without two dimensions of values",
        )
        n, m = _sides(tensor)
        need(rank <= min(h.tile, n, m), f"tensor {i}: rank {rank} exceeds {min(h.tile, n, m)}")
        want[FACTOR_P] += rank * n
        want[FACTOR_Q] += rank * m
    numbers = {}
    for kind, count in want.items():
        raw = parts.view(kind, f"<u{h.bits // 8}")
        need(
            raw.size == count,
            f"section type {kind}: expected {count} numbers for the ranks, got {raw.size}",
        )
        need(
            all_finite(raw, VALUE_CODES[h.value_dtype]),
            f"section type {kind}: a number is not finite",
        )
        numbers[kind] = decode_values(raw, h.value_dtype)
    p, q = numbers[FACTOR_P], numbers[FACTOR_Q]
    at_p = at_q = 0
    for i, (tensor, rank) in enumerate(zip(tensors, ranks.tolist(), strict=True)):
        if rank:
            n, m = _sides(tensor)
            rows = np.abs(p[at_p : at_p + n * rank].reshape(n, rank)).max(0)
            columns = np.abs(q[at_q : at_q + m * rank].reshape(rank, m)).max(1)
            reach = float((rows.astype(np.float64) * columns).sum())
            need(reach <= LARGEST, f"tensor {i}: the product of its factors may overflow")
            at_p, at_q = at_p + n * rank, at_q + m * rank
    return LowRankBody(ranks, p, q, numbers[VALUES], tensors)


RULES = Rules(_check_header, _elements, _check_lengths, _contents)
