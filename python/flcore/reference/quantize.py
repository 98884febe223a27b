"""Codes of buckets with feedback, from an update to a packet: the definition in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore._state import State
from flcore.reference import (
    buckets,
    codes_float,
    codes_linear,
    codes_rotated,
    feedback,
    wire,
    wire_bucket,
    wire_frame,
    wire_writer,
)
from flcore.reference.buckets import Settings

__all__ = ["decode", "encode", "quantize"]

_MODULES: dict[str, Any] = {
    "dense": codes_float,
    "natural": codes_float,
    "minifloat": codes_float,
    "sign": codes_linear,
    "uniform": codes_linear,
    "affine": codes_linear,
    "ternary": codes_linear,
    "rotated": codes_rotated,
}


def encode(u: np.ndarray, settings: Settings) -> tuple[bytes, bytes]:
    """Return the sections scales and codes of u, finite float32 (d,)."""
    half = None
    if settings.stochastic:
        half = buckets.random_halves(u.size, settings.seed, settings.round)
    return _MODULES[settings.codec].encode_update(u, settings, half)


def decode(header: wire.Header, body: wire_bucket.BucketBody) -> np.ndarray:
    """Return what a bucket packet stands for, float32 (d,)."""
    return _MODULES[header.codec].decode_update(header, body)


def quantize(
    g: np.ndarray, settings: Settings, *, state: State | None = None, **fields: Any
) -> bytes | None:
    """Return the packet of the update g, float32 (d,), and move the state on.

    None, with nothing changed, where t or u of the affine form is not finite.
    """
    s = settings
    block = feedback.form(g, state or State())
    if not block.finite:
        return None
    scales, codes = encode(block.u, s)
    bodies = [(wire_frame.CODES, 1, codes)]
    if wire_bucket.scales_per_bucket(s.codec):
        element = wire_frame.VALUE_BYTES[wire_frame.VALUE_CODES[s.values]]
        bodies.insert(0, (wire_frame.SCALES, element, scales))
    packet = wire_writer.frame(
        bodies,
        codec=s.codec,
        numel=g.size,
        values=s.values,
        form=s.form,
        bits=s.bits,
        tile=s.bucket,
        seed=s.seed,
        round=s.round,
        **fields,
    )
    if state is not None:
        sent = decode(*wire.parse(packet))
        feedback.store(state, block, sent, s.seed, s.round)
    return packet
