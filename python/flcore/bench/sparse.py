"""Cases of the sparse family: writing and reading coordinates, and packets of random coordinates.

The peers of the coordinates are what is at hand without flcore: 32-bit gaps through zlib. Those of
random coordinates keep the same error memory and stop at a pair of index and value arrays.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_coordinates", "build_randk"]

TILE = 65_536


def _ignoring_slot(call: Callable[[], Any], slot: int) -> Any:
    return call()


def build_coordinates(setup: Setup, *, numel: int, k: int, read: bool) -> Workload:
    """Write `k` of `numel` coordinates as bytes, or read them back."""
    from flcore.ops.indices import decode_indices, encode_indices

    kept = np.sort(setup.rng().choice(numel, k, replace=False))
    counts = np.bincount(kept // TILE, minlength=-(-numel // TILE))

    def pack(slot: int) -> bytes:
        return zlib.compress(np.diff(kept, prepend=-1).astype(np.uint32).tobytes(), 1)

    def unpack(data: bytes) -> np.ndarray:
        return np.cumsum(np.frombuffer(zlib.decompress(data), np.uint32), dtype=np.int64) - 1

    def write(coding: str, slot: int) -> np.ndarray:
        return encode_indices(kept, numel, coding)

    def restore(coding: str, section: np.ndarray) -> np.ndarray:
        return decode_indices(section, counts, numel, coding)

    def matches(slot: int, result: np.ndarray) -> str | None:
        return None if np.array_equal(result, kept) else "other coordinates"

    contestants = []
    for coding, kind in (("rice", "ours"), ("bitpack", "variant")):
        if read:
            section, name = write(coding, 0), f"flcore decode_indices {coding}"
            again = partial(_ignoring_slot, partial(restore, coding, section))
            contestants.append(Contestant(name, again, kind=kind))
        else:
            name, back = f"flcore encode_indices {coding}", partial(restore, coding)
            contestants.append(Contestant(name, partial(write, coding), back, kind=kind))
    if read:
        again = partial(_ignoring_slot, partial(unpack, pack(0)))
        contestants.append(Contestant("numpy, zlib of gaps", again))
    else:
        contestants.append(Contestant("numpy, zlib of gaps", pack, unpack))
    return Workload(contestants=contestants, matches=matches, bytes_moved=8 * k)


def build_randk(setup: Setup, *, numel: int, k: int) -> Workload:
    """Error feedback with random coordinates: memory in, packet or pairs out."""
    from flcore._state import State
    from flcore.compression import Packet
    from flcore.ops.randk import randk

    rng = setup.rng()
    g = [rng.standard_normal(numel, dtype=np.float32) for _ in range(3)]
    state = State(e=np.zeros(numel, np.float32), spare={"e": np.zeros(numel, np.float32)})

    def pairs(body: Any) -> np.ndarray:
        return np.stack([np.asarray(body[0], np.float64), np.asarray(body[1], np.float64)])

    def matches(slot: int, result: np.ndarray) -> str | None:
        kept = result[0].astype(np.int64)
        if np.unique(kept).size != k:
            return f"{np.unique(kept).size} coordinates, expected {k}"
        return None if np.array_equal(result[1], g[slot][kept]) else "other values"

    def clear() -> None:
        if state.e is not None:
            state.e.fill(0)

    contestants = [
        Contestant(
            "flcore randk",
            lambda slot: randk(g[slot], k=k, state=state, round=slot),
            lambda data: pairs(Packet.from_bytes(data).body()),
            clear,
            kind="ours",
        )
    ]
    error = np.zeros(numel, np.float32)

    def with_numpy(slot: int) -> Any:
        np.add(error, g[slot], out=error)
        kept = np.random.default_rng(slot).choice(numel, k, replace=False, shuffle=False)
        values = error[kept]
        error[kept] = 0
        return kept, values

    contestants.append(Contestant("numpy choice", with_numpy, pairs, lambda: error.fill(0)))
    absent = {}
    torch, reason = optional("torch")
    if torch is None:
        absent["torch randperm"] = reason
    else:
        memory, tensors = torch.zeros(numel), [torch.from_numpy(x) for x in g]

        def with_torch(slot: int) -> Any:
            memory.add_(tensors[slot])
            generator = torch.Generator().manual_seed(slot)
            kept = torch.randperm(numel, generator=generator)[:k]
            values = memory[kept]
            memory[kept] = 0
            return kept, values

        contestants.append(Contestant("torch randperm", with_torch, pairs, lambda: memory.zero_()))
    return Workload(
        contestants=contestants,
        matches=matches,
        bytes_moved=12 * numel,
        absent=absent,
        slots=len(g),
    )


_NOTE = (
    "flcore checks every bit of what it reads; bytes an entry: Rice 1.02, bitpack 1.2, zlib 1.65."
)

CASES = [
    Case(
        name="indices_write_10m_1pct",
        family="sparse",
        title="write 100,000 of 10,000,000 coordinates",
        formula="8·k: every coordinate read once",
        build=build_coordinates,
        sizes={"numel": 10_000_000, "k": 100_000, "read": False},
        tiny={"numel": 100_003, "k": 1000, "read": False},
        hot=True,
        note=_NOTE,
    ),
    Case(
        name="indices_read_10m_1pct",
        family="sparse",
        title="read 100,000 of 10,000,000 coordinates",
        formula="8·k: every coordinate written once",
        build=build_coordinates,
        sizes={"numel": 10_000_000, "k": 100_000, "read": True},
        tiny={"numel": 100_003, "k": 1000, "read": True},
        hot=True,
        note=_NOTE,
    ),
    Case(
        name="randk_ef14_10m_1pct",
        family="sparse",
        title="EF14 with 1 % random coordinates, 10,000,000 values",
        formula="12·d: update and memory read once, memory written once",
        build=build_randk,
        sizes={"numel": 10_000_000, "k": 100_000},
        tiny={"numel": 100_003, "k": 1000},
        bound="copy",
        note="flcore writes a checked packet, the peers stop at indices and values.",
    ),
]
