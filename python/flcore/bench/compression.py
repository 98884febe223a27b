"""Cases of the compression family: top-k with error control, and adding packets on the server.

The peers keep the same state and select the same coordinates; flcore also writes the checked
packet, they stop at (index, value) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.bench import compression_peers as peers
from flcore.bench import float_codecs, rotated
from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_decode_add", "build_econtrol", "top_k"]

# Different gradients for the error memory to meet in turn; the state makes the data cold anyway.
GRADIENTS = 3


def top_k(values: np.ndarray, k: int) -> np.ndarray:
    """Sorted indices of the k largest magnitudes, ties to the lowest index."""
    magnitude = np.abs(values)
    threshold = np.partition(magnitude, -k)[-k]
    above = np.flatnonzero(magnitude > threshold)
    ties = np.flatnonzero(magnitude == threshold)[: k - above.size]
    return np.sort(np.concatenate([above, ties]))


def _econtrol_sent(gradients: list[np.ndarray], k: int, steps: int) -> list[np.ndarray]:
    """Return the dense messages of the first steps of EControl, in float64 from the equations."""
    numel = gradients[0].size
    eta = k / numel
    error, estimate = np.zeros(numel), np.zeros(numel)
    sent = []
    for g in gradients[:steps]:
        u = eta * error + g - estimate
        message = np.zeros(numel)
        chosen = top_k(u, k)
        message[chosen] = u[chosen]
        error += g - estimate - message
        estimate += message
        sent.append(message)
    return sent


def _same_but_for_ties(
    expected: list[np.ndarray], k: int
) -> Callable[[int, np.ndarray], str | None]:
    """Return a check that forgives the few coordinates whose order float32 rounding decides."""
    forgiven = 4 + k // 5000

    def matches(slot: int, result: np.ndarray) -> str | None:
        if result.shape != expected[slot].shape:
            return f"shape {result.shape}, expected {expected[slot].shape}"
        if (kept := np.count_nonzero(result)) != k:
            return f"{kept} values sent, expected {k}"
        allowed = 1e-5 * np.abs(expected[slot]).max()
        differ = int(np.sum(~(np.abs(result - expected[slot]) <= allowed)))
        return f"{differ} of {k} values differ" if differ > forgiven else None

    return matches


def build_econtrol(setup: Setup, *, numel: int, ratio: float) -> Workload:
    """One client's uplink: EControl with top-k, state in place, one packet a call."""
    from flcore.compression import EControl, Encoder, TopK, decode

    rng = setup.rng()
    gradients = [rng.standard_normal(numel, dtype=np.float32) for _ in range(GRADIENTS)]
    k = round(ratio * numel)
    encoder = Encoder(TopK(k=k), feedback=EControl(), like=gradients[0])
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
    others, absent = peers.econtrol_peers(gradients, k, setup)
    steps = range(2)  # the second message depends on the state that the first one left
    return Workload(
        contestants=[ours, *others],
        matches=_same_but_for_ties(_econtrol_sent(gradients, k, len(steps)), k),
        bytes_moved=16 * numel + packet_bytes,
        absent=absent,
        slots=GRADIENTS,
        verify_slots=steps,
    )


def build_decode_add(setup: Setup, *, clients: int, numel: int, ratio: float) -> Workload:
    """Server's side of a round: add the packets of many clients into one dense vector."""
    from flcore.compression import Encoder, Packet, TopK, decode_add

    rng = setup.rng()
    k = round(ratio * numel)
    weights = rng.uniform(0.5, 1.5, clients).astype(np.float32) / clients
    pairs, packets, expected = [], [], np.zeros(numel)
    for weight in weights:
        update = rng.standard_normal(numel, dtype=np.float32)
        chosen = top_k(update, k)
        pairs.append((chosen, update[chosen]))
        packets.append(Encoder(TopK(k=k), like=update).encode(update, round=0, seed=0))
        expected[chosen] += float(weight) * update[chosen]
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
    others, absent = peers.sparse_sum_peers(pairs, weights, numel)
    allowed = (clients + 4) * 2.0**-24 * np.abs(expected).max() * 4
    return Workload(
        contestants=[ours, checked, *others],
        matches=lambda slot, result: difference(result, expected, allowed),
        bytes_moved=sum(map(len, wire)) + 8 * numel,
        absent=absent,
    )


CASES = [
    Case(
        name="econtrol_top1_10m",
        family="compression",
        title="EControl + top-1 %, 10,000,000 values",
        formula="16·d + packet: read e, g and h, write e; h changes at k places only",
        build=build_econtrol,
        sizes={"numel": 10_000_000, "ratio": 0.01},
        tiny={"numel": 40_009, "ratio": 0.01},
        bound="copy",
        note="flcore writes the packet, the peers stop at index and value arrays.",
    ),
    Case(
        name="decode_add_32x1m_top1",
        family="compression",
        title="sum of 32 top-1 % packets, 1,000,000 values",
        formula="packets + 8·d: packets read once, the sum read and written once",
        build=build_decode_add,
        sizes={"clients": 32, "numel": 1_000_000, "ratio": 0.01},
        tiny={"clients": 4, "numel": 40_009, "ratio": 0.01},
        bound="copy",
        hot=True,
        note="Packets and sum stay in cache, the dense updates of `weights @ stacked` do not. "
        "The index-wise peers start from decoded arrays: reading packets costs them nothing.",
    ),
    *rotated.CASES,
    *float_codecs.CASES,
]
