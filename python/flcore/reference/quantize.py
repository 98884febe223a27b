"""Codes of buckets with feedback, from an update to a packet: the definition in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore._state import State
from flcore.reference import buckets, codes_linear, feedback, wire, wire_bucket, wire_writer
from flcore.reference.buckets import Settings

__all__ = ["decode", "encode", "quantize"]

_MODULES: dict[str, Any] = {
    "sign": codes_linear,
    "uniform": codes_linear,
    "affine": codes_linear,
    "ternary": codes_linear,
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
    bodies = [(wire.CODES, 1, codes)]
    if per_bucket := wire_bucket.scales_per_bucket(s.codec):
        count = per_bucket * -(-g.size // s.bucket)
        bodies.insert(0, (wire.SCALES, len(scales) // count if count else 4, scales))
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
