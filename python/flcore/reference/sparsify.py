"""Exact top-k with feedback: the definition in NumPy.

Arithmetic is float32 in a fixed order, so packets and state of every variant equal these byte for
byte. See :func:`flcore.ops.sparsify.sparsify` for the meaning of the arguments.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from flcore._state import State
from flcore.reference import feedback, wire_writer
from flcore.reference.sparse_values import code_values, round_values

__all__ = [
    "RUN",
    "keys",
    "round_values",
    "sample",
    "select",
    "select_segments",
    "sparsify",
    "store",
]


RUN = 32
"""Neighbours that a sample takes together."""


def keys(u: np.ndarray) -> np.ndarray:
    """Return bits(u) & 0x7fffffff as uint32: the order of ``|u|``, for float32 `u`."""
    return np.ascontiguousarray(u, np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)


def select(u: np.ndarray, k: int) -> np.ndarray:
    """Return the sorted indices of the k entries of `u` that come first: larger ``|u|``, then
    smaller index. ``|u|`` is compared through :func:`keys`.
    """  # noqa: D205
    order = np.lexsort((np.arange(u.size), -keys(u).astype(np.int64)))
    return np.sort(order[:k])


def select_segments(
    u: np.ndarray, starts: np.ndarray, k: np.ndarray, floor: int, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted indices that are kept, and the key of each segment's k-th entry.

    Parameters
    ----------
    starts, k : (segments + 1,), (segments,) int64
        Segment s holds coordinates starts[s] to starts[s + 1] - 1 and keeps its first k[s].
    floor : int
        Entries whose key is smaller are not kept.
    rank : int
        Entry whose key is returned instead of the k-th; 0: the k-th. The key is 0 where it is below
        the floor, and for an empty segment.
    """
    kept, tau = [np.empty(0, np.int64)], np.zeros(k.size, np.uint32)
    for s, (begin, end) in enumerate(pairwise(starts)):
        if begin == end:
            continue
        part = u[begin:end]
        chosen = select(part, int(k[s]))
        ordered = np.sort(keys(part)[chosen])[::-1]
        last = ordered[(rank or int(k[s])) - 1]
        tau[s] = last if last >= floor else 0
        kept.append(begin + chosen[keys(part)[chosen] >= floor])
    return np.concatenate(kept), tau


def sample(numel: int, step: int, phase: int) -> np.ndarray:
    """Return the coordinates of a sample: of `step` runs of `RUN` the one at `phase`."""
    first = np.arange(RUN * phase, max(numel, RUN * phase), RUN * step)
    at = (first[:, None] + np.arange(RUN)).ravel()
    return at[at < numel]


def store(
    state: State, block: feedback.Block, kept: np.ndarray, sent: np.ndarray, seed: int, round: int
) -> None:
    """Write the state after `sent`, float32, went out at the coordinates `kept`, and commit it.

    h changes there and nowhere else, in place, so that its spare is not needed.
    """
    dense = np.zeros(block.u.size, np.float32)
    dense[kept] = sent
    rest = replace(state, h=None)
    feedback.store(rest, block, dense, seed, round)
    state.e, state.v = rest.e, rest.v
    if state.h is not None:
        state.h[kept] += sent


def sparsify(
    g: np.ndarray,
    *,
    state: State,
    starts: np.ndarray,
    k: np.ndarray,
    floor: int,
    rank: int,
    tau: np.ndarray | None,
    values: str,
    index: str,
    round: int,
    seed: int,
    tensors: bytes = b"",
    **fields: Any,
) -> bytes | None:
    """Return the packet and move `state` on; None, with nothing written, if not finite.

    `g` is the whole gradient as float32 (d,); `starts`, `k`, `floor` and `rank` are those of
    :func:`select_segments`, and `tau` receives its keys; `fields` are the header fields of
    :func:`flcore.reference.wire_writer.build`.
    """
    block = feedback.form(g, state)
    if not block.finite:
        return None
    kept, last = select_segments(block.u, starts, k, floor, rank)
    coded = code_values(block.u[kept], kept, g.size, values)
    store(state, block, kept, coded.sent, seed, round)
    if tau is not None:
        tau[:] = last
    return wire_writer.build(
        kept,
        coded.raw,
        numel=g.size,
        values=values,
        index=index,
        scales=coded.scales,
        round=round,
        seed=seed,
        tensors=tensors,
        **fields,
    )
