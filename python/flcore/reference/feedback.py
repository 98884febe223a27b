"""The affine form of error control: the definition in NumPy (see :class:`flcore._state.State`).

Float32 in a fixed order, every operation rounded once: state of every variant equals this bit for
bit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flcore._state import State
from flcore.reference import rng, streams

__all__ = ["Block", "form", "from_state", "store"]


class Block(NamedTuple):
    """s, t and u of :class:`flcore._state.State`, float32 (d,)."""

    s: np.ndarray
    t: np.ndarray
    u: np.ndarray

    @property
    def finite(self) -> bool:
        """Whether t and u are finite everywhere."""
        return bool(np.isfinite(self.t).all() and np.isfinite(self.u).all())


def from_state(x: np.ndarray) -> np.ndarray:
    """Return a state buffer as float32: itself, or the numbers of its bfloat16 bits."""
    return x if x.dtype == np.float32 else (x.astype(np.uint32) << 16).view(np.float32)


def form(g: np.ndarray, state: State) -> Block:
    """Return s, t and u for the whole update `g`, float32 (d,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        s = g
        if state.v is not None:
            s = np.float32(state.p) * from_state(state.v) + np.float32(state.q) * g
        t = u = s
        if state.e is not None:
            e = from_state(state.e)
            t, u = np.float32(state.b) * e + s, np.float32(state.a) * e + s
        if state.h is not None:
            t, u = t - state.h, u - state.h
    return Block(s, t, u)


def store(state: State, block: Block, sent: np.ndarray, seed: int, round: int) -> None:
    """Write the state after `sent`, D as float32 (d,), and commit it."""
    if state.e is not None:
        _write(state.new("e"), block.t - sent, seed, round, 0)
    if state.h is not None:
        _write(state.new("h"), state.h + sent, seed, round, 0)
    if state.v is not None:
        v = np.where(sent != 0, np.float32(0), block.s) if state.mask else block.s
        _write(state.new("v"), v, seed, round, 1)
    state.commit()


def _write(out: np.ndarray | None, values: np.ndarray, seed: int, round: int, which: int) -> None:
    assert out is not None
    if out.dtype == np.float32:
        out[:] = values
        return
    words = rng.random_bits(
        -(-values.size // 2), seed, round=round & 0xFFFFFFFF, tensor=streams.STATE, client=which
    )
    half = words.view(np.uint16)[: values.size].astype(np.uint32)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    up = bits + half
    up = np.where(up & 0x7FFFFFFF >= 0x7F800000, bits, up)
    out[:] = (up >> 16).astype(np.uint16)
