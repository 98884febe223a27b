"""Random coordinates with feedback: the definition in NumPy.

Arithmetic is float32 in a fixed order, so packets and state of every variant equal these byte for
byte. See :func:`flcore.ops.randk.randk` for the meaning of the arguments.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore._state import State
from flcore.reference import feedback, permutation, wire_writer
from flcore.reference.sparse_values import code_values
from flcore.reference.sparsify import store

__all__ = ["randk"]


def randk(
    g: np.ndarray,
    *,
    state: State,
    k: int,
    scale: float,
    values: str,
    round: int,
    seed: int,
    tensors: bytes = b"",
    **fields: Any,
) -> bytes | None:
    """Return the packet and move `state` on; None, with nothing written, if not finite.

    `g` is the whole gradient as float32 (d,); `fields` are the header fields of
    :func:`flcore.reference.wire_writer.build`.
    """
    block = feedback.form(g, state)
    kept = permutation.coordinates(g.size, k, seed, round)
    with np.errstate(over="ignore"):
        u = block.u[kept] * np.float32(scale)
    if not block.finite or not np.isfinite(u).all():
        return None
    coded = code_values(u, kept, g.size, values)
    store(state, block, kept, coded.sent, seed, round)
    return wire_writer.build(
        kept,
        coded.raw,
        numel=g.size,
        values=values,
        index="seeded",
        scales=coded.scales,
        round=round,
        seed=seed,
        tensors=tensors,
        **fields,
    )
