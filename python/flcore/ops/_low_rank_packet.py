"""Low-rank packets of given factors, and the factors of a packet: for the server of PowerSGD."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore import _arrays, _native
from flcore.errors import InvalidInputError
from flcore.reference import wire_frame as frame
from flcore.reference.low_rank import Plan

__all__ = ["factors_of", "frame_of", "pack_factors"]


def frame_of(
    plan: Plan, rank: int, values: str, source_dtype: str, tensors: bytes, **fields: int
) -> tuple[Any, np.ndarray]:
    """Return the frame of a packet and its memory, (nbytes,) uint8, with the ranks filled in."""
    code = frame.VALUE_CODES[values]
    size = frame.VALUE_BYTES[code]
    made = _native.core.PacketFrame(
        codec=frame.CODECS["low_rank"],
        numel=sum(plan.numel),
        value_dtype=code,
        form=0,
        bits=8 * size,
        tile=rank,
        source_dtype=frame.SOURCE_DTYPES[source_dtype],
        sections=[
            (frame.COUNTS, 4, 4 * len(plan.rank)),
            (frame.VALUES, size, size * plan.values),
            (frame.FACTOR_P, size, size * plan.p),
            (frame.FACTOR_Q, size, size * plan.q),
        ],
        tensors=tensors,
        **fields,
    )
    packet = np.empty(made.nbytes, np.uint8)
    at = made.offset(frame.COUNTS)
    packet[at : at + 4 * len(plan.rank)] = np.array(plan.rank, "<u4").view(np.uint8)
    return made, packet


def pack_factors(
    plan: Plan,
    p: np.ndarray,
    q: np.ndarray,
    values: np.ndarray,
    *,
    rank: int,
    tensors: bytes,
    round: int,
    seed: int,
) -> np.ndarray:
    """Return the float32 packet of these factors and values, not checked any further."""
    fields = {"round": round, "seed": seed, "epoch": 0, "flags": 0}
    made, packet = frame_of(plan, rank, "float32", "float32", tensors, **fields)
    for kind, x in ((frame.VALUES, values), (frame.FACTOR_P, p), (frame.FACTOR_Q, q)):
        at = made.offset(kind)
        packet[at : at + x.nbytes] = np.ascontiguousarray(x, "<f4").view(np.uint8)
    made.seal(_arrays.address(packet))
    return packet


def factors_of(packet: Any, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Return P (plan.p,) and Q^T (plan.q,) of a checked float32 packet, copied.

    Raises
    ------
    InvalidInputError
        It is not a packet of this plan.
    """
    h = packet.header
    if (h.codec, h.value_dtype, h.numel) != ("low_rank", "float32", sum(plan.numel)):
        raise InvalidInputError(
            f"packet: expected low_rank factors in float32 of {sum(plan.numel)} coordinates, "
            f"got {h.codec} in {h.value_dtype} of {h.numel}"
        )
    data = packet.to_numpy()

    def section(kind: int, dtype: str) -> np.ndarray:
        offset, length = packet.view.section(kind)
        return data[offset : offset + length].copy().view(dtype)

    p, q = section(frame.FACTOR_P, "<f4"), section(frame.FACTOR_Q, "<f4")
    ranks = tuple(section(frame.COUNTS, "<u4").tolist())
    if ranks != plan.rank or (p.size, q.size) != (plan.p, plan.q):
        raise InvalidInputError(f"packet: expected layers of ranks {plan.rank}, got {ranks}")
    return p, q
