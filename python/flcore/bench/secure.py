"""Cases of the secure family: masked sums on the server, keystreams, and encoding on the client.

Every peer that makes masks has its own streams, so what is compared is the words after the masks
were taken off again; the removal is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.bench import secure_peers as peers
from flcore.bench.cases import Case, Setup, Workload
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_encode", "build_keystream", "build_sum"]

CLIP, LEVELS = 8.0, 1 << 22


def _equal(expected: np.ndarray) -> Callable[[int, np.ndarray], str | None]:
    """Return a check that every word is the expected one."""

    def matches(slot: int, result: np.ndarray) -> str | None:
        if result.shape != expected.shape:
            return f"shape {result.shape}, expected {expected.shape}"
        differ = int((result.view(np.uint32) != expected).sum())
        return f"{differ} of {expected.size} words differ" if differ else None

    return matches


def build_sum(setup: Setup, *, clients: int, numel: int) -> Workload:
    """Server's side of a round: add the messages of all clients modulo 2^32."""
    from flcore.ops import modular_sum

    rng = setup.rng()
    rows = rng.integers(0, 1 << 32, (clients, numel), np.uint32)
    total = np.zeros(numel, np.uint32)

    def clear() -> None:
        total.fill(0)

    def stream(slot: int) -> np.ndarray:
        for row in rows:
            modular_sum([row], acc=total)
        return total

    ours = Contestant("flcore modular_sum", lambda slot: modular_sum(rows), kind="ours")
    streaming = Contestant(
        "flcore modular_sum, one message at a time", stream, reset=clear, kind="variant"
    )
    others, absent = peers.sum_peers(rows)
    expected = rows.sum(axis=0, dtype=np.uint64).astype(np.uint32)
    return Workload(
        contestants=[ours, streaming, *others],
        matches=_equal(expected),
        bytes_moved=4 * numel * (clients + 1),
        absent=absent,
        slots=1,
    )


def build_keystream(setup: Setup, *, numel: int) -> Workload:
    """One mask over one message: a ChaCha20 keystream and its addition."""
    from flcore.ops import mask_add
    from flcore.ops.mask import Mask

    mask = Mask(setup.rng().bytes(32), 1, bytes(12))
    words = np.zeros(numel, np.uint32)  # addition and exclusive or then give the same words
    out = np.empty_like(words)
    ours = Contestant("flcore mask_add", lambda slot: mask_add(words, [mask], out=out), kind="ours")
    others, absent = peers.keystream_peers(mask.key, words)
    expected = mask_add(words[: 1 << 12], [mask], variant="reference")
    check = _equal(expected)
    return Workload(
        contestants=[ours, *others],
        matches=lambda slot, result: check(slot, result[: expected.size]),
        bytes_moved=8 * numel,
        absent=absent,
    )


def build_encode(setup: Setup, *, numel: int, neighbours: int) -> Workload:
    """Client's side of a round: weight, clip, quantise, one private mask and one a neighbour."""
    from flcore.ops import mask_add
    from flcore.privacy import SecureSum

    rng = setup.rng()
    slots = setup.cold_slots(4 * numel)
    updates = [rng.standard_normal(numel, dtype=np.float32) for _ in range(slots)]
    weight, secure = 400.0, SecureSum(clip=CLIP, levels=LEVELS)
    keys = {other: rng.bytes(32) for other in range(1, neighbours + 1)}
    masks = secure.masks(0, rng.bytes(32), keys)
    removed = [mask._replace(sign=-mask.sign) for mask in masks]

    def encode(slot: int, **options: Any) -> np.ndarray:
        return secure.encode(updates[slot], weight, masks=masks, seed=slot, **options)

    ours = Contestant(
        "flcore SecureSum.encode", encode, lambda words: mask_add(words, removed), kind="ours"
    )
    q = secure.integer_weight(weight)
    others = peers.encode_peers(updates, q, neighbours, CLIP, LEVELS)

    def matches(slot: int, words: np.ndarray) -> str | None:
        if words.shape != (numel + 1,) or words[0] != q:
            return f"expected {numel + 1} words, the first {q}"
        y = updates[slot].astype(np.float64) * (q / LEVELS)
        u = (np.clip(y, -CLIP, CLIP) + CLIP) * (LEVELS / (2 * CLIP))
        # a step of stochastic rounding, and the rounding of peers that compute in float32
        worst = float(np.abs(words[1:].astype(np.float64) - u).max())
        return None if worst <= 2.0 else f"a word is {worst:.3g} steps off"

    return Workload(
        contestants=[ours, *others],
        matches=matches,
        bytes_moved=8 * numel,
        slots=slots,
    )


CASES = [
    Case(
        name="modular_sum_50x1m",
        family="secure",
        title="sum of 50 masked messages, 1,000,000 words",
        formula="4·(n + 1)·d: every message read once, the sum written once",
        build=build_sum,
        sizes={"clients": 50, "numel": 1_000_000},
        tiny={"clients": 5, "numel": 10_007},
        dtype="uint32",
    ),
    Case(
        name="keystream_10m",
        family="secure",
        title="one mask over 10,000,000 words",
        formula="8·d: words read and written; the keystream, 4·d bytes, moves no memory",
        build=build_keystream,
        sizes={"numel": 10_000_000},
        tiny={"numel": 10_007},
        dtype="uint32",
        bound="copy",
        note="The rate of the keystream is half the GB/s. RandomState is what Flower masks with; "
        "it is not a cipher.",
    ),
    Case(
        name="secure_encode_1m_9masks",
        family="secure",
        title="encode 1,000,000 values with 9 masks",
        formula="8·d: the update read once, the words written once",
        build=build_encode,
        sizes={"numel": 1_000_000, "neighbours": 8},
        tiny={"numel": 10_007, "neighbours": 2},
        bound="copy",
        note="The work is nine keystreams, 36 bytes a value, that never reach memory.",
    ),
]
