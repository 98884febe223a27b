"""Cases of the compression family: top-k with error control, and adding packets on the server.

The peers keep the same state and select the same coordinates; flcore also writes the checked
packet, they stop at (index, value) pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flcore.bench import compression_peers as peers
from flcore.bench import float_codecs, quantize, rotated
from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_decode_add", "build_econtrol", "build_top_k", "top_k"]

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


def _sampled_econtrol(gradients: list[np.ndarray], k: int) -> Contestant:
    """One pass that takes its threshold from a sample; state to a second buffer."""
    from flcore._state import State
    from flcore.compression import Packet, decode
    from flcore.ops.sparsify import sparsify

    numel = gradients[0].size
    e, h, spare = (np.zeros(numel, np.float32) for _ in range(3))
    state = State(e=e, h=h, a=k / numel, spare={"e": spare})

    def reset() -> None:
        for x in state.buffers().values():
            x.fill(0)

    return Contestant(
        "flcore sparsify, threshold from a sample",
        lambda slot: sparsify(gradients[slot], k=k, state=state, round=slot),
        to_numpy=lambda packet: np.asarray(decode(Packet.from_bytes(packet))),
        reset=reset,
        kind="variant",
    )


def build_econtrol(setup: Setup, *, numel: int, ratio: float, carried: bool) -> Workload:
    """One client's uplink: EControl with top-k, one packet a call.

    `carried`: the steady state, in which an encoder knows the threshold of its last packet; else
    every call is like the first, which does not.
    """
    from flcore.compression import EControl, Encoder, TopK, decode

    rng = setup.rng()
    gradients = [rng.standard_normal(numel, dtype=np.float32) for _ in range(GRADIENTS)]
    k = round(ratio * numel)

    def encoding(name: str, *, in_place: bool) -> Contestant:
        codec = TopK(k=k, index="tile16")
        encoder = Encoder(codec, EControl(), like=gradients[0], in_place=in_place)
        return Contestant(
            name,
            lambda slot: encoder.encode(gradients[slot], round=slot, seed=0),
            to_numpy=lambda packet: np.asarray(decode(packet)),
            reset=encoder.reset,
            kind="ours",
        )

    if carried:
        ours = [encoding("flcore Encoder.encode", in_place=False)]
    else:  # in place an encoder looks at everything before it writes, and needs no threshold
        ours = [
            encoding("flcore Encoder.encode, two passes", in_place=True),
            _sampled_econtrol(gradients, k),
        ]
    packet_bytes = Encoder(TopK(k=k), like=gradients[0]).encode(gradients[0]).nbytes
    others, absent = peers.econtrol_peers(gradients, k, setup)
    steps = range(2)  # the second message depends on the state that the first one left
    return Workload(
        contestants=[*ours, *others],
        matches=_same_but_for_ties(_econtrol_sent(gradients, k, len(steps)), k),
        bytes_moved=(16 if carried else 28) * numel + packet_bytes,
        absent=absent,
        slots=GRADIENTS,
        verify_slots=steps,
    )


def build_top_k(setup: Setup, *, numel: int, ratio: float) -> Workload:
    """Select and encode the k largest of an update, without state."""
    from flcore.compression import Packet, decode
    from flcore.ops.sparsify import sparsify

    rng = setup.rng()
    nbytes = 4 * numel
    updates = [
        rng.standard_normal(numel, dtype=np.float32) for _ in range(setup.cold_slots(nbytes))
    ]
    k = round(ratio * numel)
    expected = np.zeros(numel, np.float32)
    chosen = top_k(updates[0], k)
    expected[chosen] = updates[0][chosen]
    known = np.zeros(1, np.uint32)

    def dense(packet: np.ndarray) -> np.ndarray:
        return np.asarray(decode(Packet.from_bytes(packet)))

    contestants = [
        Contestant(
            "flcore sparsify", lambda slot: sparsify(updates[slot], k=k), dense, kind="ours"
        ),
        Contestant(
            "flcore sparsify, threshold carried",
            lambda slot: sparsify(updates[slot], k=k, tau=known),
            dense,
            kind="variant",
        ),
    ]
    others, absent = peers.top_k_peers(updates, k)
    return Workload(
        contestants=[*contestants, *others],
        matches=lambda slot, result: difference(result, expected, 0.0),
        bytes_moved=nbytes + 6 * k,
        absent=absent,
        slots=len(updates),
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
        sizes={"numel": 10_000_000, "ratio": 0.01, "carried": True},
        tiny={"numel": 80_009, "ratio": 0.01, "carried": True},
        bound="copy",
        note="Steady state: the threshold of the last packet is known. flcore writes the packet, "
        "the peers stop at index and value arrays.",
    ),
    Case(
        name="econtrol_first_top1_10m",
        family="compression",
        title="EControl + top-1 %, no threshold known, 10,000,000 values",
        formula="28·d + packet: read e, g and h twice, write e; h changes at k places only",
        build=build_econtrol,
        sizes={"numel": 10_000_000, "ratio": 0.01, "carried": False},
        tiny={"numel": 80_009, "ratio": 0.01, "carried": False},
        bound="copy",
        note="Every call is like the first of a client. With a threshold from a sample and a "
        "second buffer for e, 16·d bytes and the sample move.",
    ),
    Case(
        name="top1_10m",
        family="compression",
        title="top-1 %, 10,000,000 values",
        formula="4·d + packet: every value read once",
        build=build_top_k,
        sizes={"numel": 10_000_000, "ratio": 0.01},
        tiny={"numel": 80_009, "ratio": 0.01},
        note="flcore writes the packet, the peers stop at unordered index and value arrays.",
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
    *quantize.CASES,
    *rotated.CASES,
    *float_codecs.CASES,
]
