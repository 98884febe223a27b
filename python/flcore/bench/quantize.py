"""Cases of codes of buckets: encoding with error feedback, and adding packets of 8-bit codes.

The peers do the same arithmetic and stop at packed codes and scales; flcore writes the checked
packet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.bench import quantize_peers as peers
from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_decode_add", "build_ef14"]

BUCKET = 500
GRADIENTS = 3


def _sent(gradients: list[np.ndarray], levels: int, steps: int) -> list[tuple[np.ndarray, float]]:
    """Return dense messages of the first steps, and their largest step, in float64.

    `levels` 0: signs times the mean magnitude of the bucket.
    """
    error = np.zeros(gradients[0].size)
    sent = []
    for g in gradients[:steps]:
        u = error + g
        message = np.empty_like(u)
        widest = 0.0
        for start in range(0, u.size, BUCKET * 1000):  # in cache
            part = u[start : start + BUCKET * 1000]
            whole = part.size // BUCKET * BUCKET
            for piece, out in (
                (part[:whole].reshape(-1, BUCKET), message[start : start + whole]),
                (part[whole:].reshape(1, -1), message[start + whole : start + part.size]),
            ):
                if not piece.size:
                    continue
                if levels:
                    unit = np.abs(piece).max(1, keepdims=True) / levels
                    out[:] = (unit * np.rint(piece / unit)).reshape(-1)
                else:
                    unit = np.abs(piece).mean(1, keepdims=True)
                    out[:] = np.where(piece < 0, -unit, unit).reshape(-1)
                widest = max(widest, float(unit.max()) * (1 if levels else 2))
        error = u - message
        sent.append((message, widest))
    return sent


def _same_but_for_ties(
    expected: list[tuple[np.ndarray, float]],
) -> Callable[[int, np.ndarray], str | None]:
    """Return a check that forgives a step at the few values that float32 rounding decides."""

    def matches(slot: int, result: np.ndarray) -> str | None:
        want, step = expected[slot]
        if result.shape != want.shape:
            return f"shape {result.shape}, expected {want.shape}"
        error = np.abs(result - want)
        if not error.max(initial=0) <= 2.01 * step:  # a step of the round before moves two now
            return f"a value is {error.max():.3g} off, more than two steps of {step:.3g}"
        differ = int(np.sum(error > 1e-4 * step))
        return f"{differ} values differ" if differ > 4 + want.size // 2000 else None

    return matches


def build_ef14(setup: Setup, *, numel: int, bits: int) -> Workload:
    """One client's uplink: EF14 with codes of `bits` bits, one packet a call; 1: signs."""
    from flcore.compression import EF14, AbsMax, Encoder, Sign, decode

    rng = setup.rng()
    gradients = [rng.standard_normal(numel, dtype=np.float32) for _ in range(GRADIENTS)]
    codec = Sign(bucket=BUCKET) if bits == 1 else AbsMax(bits=bits, bucket=BUCKET)
    encoder = Encoder(codec, EF14(), like=gradients[0])
    packet_bytes = encoder.encode(gradients[0], round=0, seed=0).nbytes

    def encode(slot: int) -> Any:
        return encoder.encode(gradients[slot], round=slot, seed=0)

    ours = Contestant(
        "flcore Encoder.encode",
        encode,
        to_numpy=lambda packet: np.asarray(decode(packet)),
        reset=encoder.reset,
        kind="ours",
    )
    levels = 0 if bits == 1 else 2 ** (bits - 1) - 1
    others, absent = peers.ef14_peers(gradients, levels, BUCKET, setup)
    steps = range(2)  # the second message depends on the memory that the first one left
    return Workload(
        contestants=[ours, *others],
        matches=_same_but_for_ties(_sent(gradients, levels, len(steps))),
        bytes_moved=12 * numel + packet_bytes,
        absent=absent,
        slots=GRADIENTS,
        verify_slots=steps,
    )


def build_decode_add(setup: Setup, *, clients: int, numel: int) -> Workload:
    """Server's side of a round: add packets of 8-bit codes into one dense vector."""
    from flcore.compression import AbsMax, Encoder, Packet, decode, decode_add

    rng = setup.rng()
    weights = rng.uniform(0.5, 1.5, clients).astype(np.float32) / clients
    packets, expected = [], np.zeros(numel)
    for weight in weights:
        update = rng.standard_normal(numel, dtype=np.float32)
        packets.append(Encoder(AbsMax(bits=8, bucket=BUCKET), like=update).encode(update))
        expected += float(weight) * np.asarray(decode(packets[-1]), np.float64)
    wire = [bytes(packet) for packet in packets]
    total = np.zeros(numel, np.float32)

    def clear() -> None:
        total.fill(0)

    ours = Contestant(
        "flcore decode_add",
        lambda slot: decode_add(packets, weights, total),
        reset=clear,
        kind="ours",
    )
    checked = Contestant(
        "flcore decode_add, checking received bytes",
        lambda slot: decode_add([Packet.from_bytes(data) for data in wire], weights, total),
        reset=clear,
        kind="variant",
    )
    others, absent = peers.dequantise_add_peers(packets, weights, BUCKET, setup)
    allowed = (clients + 4) * 2.0**-24 * np.abs(expected).max() * 4
    return Workload(
        contestants=[ours, checked, *others],
        matches=lambda slot, result: difference(result, expected, allowed),
        bytes_moved=sum(map(len, wire)) + 8 * numel,
        absent=absent,
    )


def _ef14_case(name: str, title: str, bits: int) -> Case:
    return Case(
        name=name,
        family="compression",
        title=f"EF14 + {title}, bucket {BUCKET}, 10,000,000 values",
        formula="12·d + packet: read e and g, write e",
        build=build_ef14,
        sizes={"numel": 10_000_000, "bits": bits},
        tiny={"numel": 40_000, "bits": bits},
        bound="copy",
        note="flcore writes the checked packet, the peers stop at packed codes and scales.",
    )


CASES = [
    _ef14_case("ef14_absmax8_10m", "AbsMax(8)", 8),
    _ef14_case("ef14_absmax4_10m", "AbsMax(4)", 4),
    _ef14_case("ef14_sign_10m", "Sign", 1),
    Case(
        name="decode_add_32x1m_8bit",
        family="compression",
        title="sum of 32 packets of 8-bit codes, 1,000,000 values",
        formula="packets + 8·d: packets read once, the sum read and written once",
        build=build_decode_add,
        sizes={"clients": 32, "numel": 1_000_000},
        tiny={"clients": 4, "numel": 40_000},
        bound="copy",
        hot=True,
        note="The peers start from int8 codes and scales as arrays: reading packets costs nothing.",
    ),
]
