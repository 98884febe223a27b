"""Cases of the server's side of packets: robust rules, a server step and votes without unpacking.

Peers read the same bytes and end with the same result; torch starts from the codes and scales as
arrays, so that reading and checking packets costs it nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import optional
from flcore.bench.field import Field
from flcore.bench.timers import Contestant
from flcore.reference.select import order_statistic

__all__ = ["CASES", "build_server_step", "build_trimmed_mean", "build_vote"]

BUCKET = 512


def _packets(setup: Setup, codec: Any, clients: int, numel: int) -> list[Any]:
    """Packets of clients about a common mean."""
    from flcore.compression import Encoder

    rng = setup.rng()
    mean = rng.standard_normal(numel, dtype=np.float32)
    encoder = Encoder(codec, like=mean)
    return [
        encoder.encode(mean + rng.standard_normal(numel, dtype=np.float32), round=i)
        for i in range(clients)
    ]


def build_trimmed_mean(setup: Setup, *, clients: int, numel: int, f: int) -> Workload:
    """Trimmed mean of 4-bit packets, beside decoding them all first."""
    from flcore.aggregation import TrimmedMean
    from flcore.compression import AbsMax, decode

    packets = _packets(setup, AbsMax(4, bucket=BUCKET), clients, numel)
    rule = TrimmedMean(f)
    rows = [np.empty(numel, np.float32) for _ in packets]

    def decode_first(slot: int) -> np.ndarray:
        for packet, row in zip(packets, rows, strict=True):
            decode(packet, out=row)
        return rule(rows)

    field = Field()
    field.add("flcore decode, then TrimmedMean", decode_first)
    torch, reason = optional("torch")
    if torch is None:
        field.leave_out(reason, "torch dequantise, then sort")
    else:
        _torch_trimmed_mean(field, torch, packets, numel, f)
    decode_first(0)
    expected = order_statistic(np.stack(rows).astype(np.float64), "trimmed_mean", f=f)
    allowed = (clients + 4) * 2.0**-24 * np.abs(rows).max()
    return Workload(
        contestants=[
            Contestant("flcore TrimmedMean of packets", lambda slot: rule(packets), kind="ours"),
            *field.peers,
        ],
        matches=lambda slot, result: difference(result, expected, allowed),
        bytes_moved=sum(p.nbytes for p in packets) + 4 * numel,
        absent=field.absent,
    )


def _torch_trimmed_mean(field: Field, torch: Any, packets: list[Any], numel: int, f: int) -> None:
    bodies = [p.body() for p in packets]
    codes = torch.from_numpy(np.stack([b.codes for b in bodies]))
    scales = torch.from_numpy(np.stack([b.scales for b in bodies]))  # (n, buckets, 1)
    n, buckets = len(packets), scales.shape[1]

    def call(slot: int) -> Any:
        wide = torch.stack([codes & 15, codes >> 4], dim=2).reshape(n, -1)
        wide = torch.nn.functional.pad(wide, (0, buckets * BUCKET - wide.shape[1]))
        values = (wide.reshape(n, buckets, BUCKET).float() - 7) * scales
        ordered = torch.sort(values.reshape(n, -1)[:, :numel], dim=0).values
        return ordered[f : n - f].mean(dim=0)

    field.add("torch dequantise, then sort", call)


def build_server_step(setup: Setup, *, clients: int, numel: int) -> Workload:
    """FedAvgM from 8-bit packets: their mean and the step in one pass over the model."""
    from flcore.aggregation import FedAvgM
    from flcore.compression import AbsMax, decode, decode_add

    packets = _packets(setup, AbsMax(8, bucket=BUCKET), clients, numel)
    total = np.zeros(numel, np.float32)

    def contestant(name: str, kind: str, updates: Callable[[], list[Any]]) -> Contestant:
        server = FedAvgM(lr=0.5, momentum=0.9)
        models = [np.zeros(numel, np.float32) for _ in range(2)]

        def step(slot: int) -> np.ndarray:
            models.reverse()
            return server.step(models[1], updates(), out=models[0])

        def reset() -> None:
            server.reset()
            models[0][:] = 0

        return Contestant(name, step, reset=reset, kind=kind)

    def mean_of_packets() -> list[Any]:
        total.fill(0)
        return [decode_add(packets, [1 / clients] * clients, total)]

    mean = np.mean([decode(p).astype(np.float64) for p in packets], axis=0)
    allowed = (clients + 4) * 2.0**-24 * np.abs(mean).max() * 8
    return Workload(
        contestants=[
            contestant("flcore step from packets", "ours", lambda: packets),
            contestant("flcore decode_add, then step", "peer", mean_of_packets),
        ],
        matches=lambda slot, result: difference(result, 0.5 * mean, allowed),
        bytes_moved=sum(p.nbytes for p in packets) + 16 * numel,
    )


def build_vote(setup: Setup, *, clients: int, numel: int) -> Workload:
    """Majority of packed signs."""
    from flcore.compression import Sign
    from flcore.ops.vote import vote

    packets = _packets(setup, Sign(bucket=65536), clients, numel)
    codes = np.stack([p.body().codes for p in packets])  # buckets of whole bytes: one string

    def unpack(slot: int) -> np.ndarray:
        negatives = np.zeros(numel, np.uint8)
        for row in codes:
            negatives += np.unpackbits(row, count=numel, bitorder="little")
        return np.sign(clients - 2 * negatives.astype(np.int16)).astype(np.float32)

    expected = unpack(0)
    field = Field()
    field.add("numpy unpackbits, then add", unpack)
    torch, reason = optional("torch")
    if torch is None:
        field.leave_out(reason, "torch unpack, then sum")
    else:
        tensor = torch.from_numpy(codes)
        places = torch.arange(8, dtype=torch.uint8)

        def torch_vote(slot: int) -> Any:
            bits = (tensor.unsqueeze(2) >> places) & 1
            negatives = bits.reshape(clients, -1)[:, :numel].sum(dim=0, dtype=torch.int16)
            return torch.sign(clients - 2 * negatives).float()

        field.add("torch unpack, then sum", torch_vote)
    bits = np.packbits(expected < 0, bitorder="little")
    return Workload(
        contestants=[
            Contestant("flcore vote", lambda slot: vote(packets), kind="ours"),
            Contestant(
                "flcore vote, packed result",
                lambda slot: vote(packets, form="bits"),
                matches=lambda slot, result: (
                    None if np.array_equal(result, bits) else "bits differ"
                ),
                kind="variant",
            ),
            *field.peers,
        ],
        matches=lambda slot, result: difference(result, expected, 0.0),
        bytes_moved=codes.nbytes + 4 * numel,
        absent=field.absent,
    )


CASES = [
    Case(
        name="trimmed_mean_packets_32x1m",
        family="packets",
        title="TrimmedMean(6) of 32 4-bit packets, 1,000,000 values",
        formula="packets + 4·d: packets read once, the result written once",
        build=build_trimmed_mean,
        sizes={"clients": 32, "numel": 1_000_000, "f": 6},
        tiny={"clients": 7, "numel": 5003, "f": 1},
        hot=True,
        note="The decoded rows of the first peer are 128 MB that it writes and reads again, into "
        "memory it keeps between calls.",
    ),
    Case(
        name="step_packets_32x1m",
        family="packets",
        title="FedAvgM step from 32 8-bit packets, 1,000,000 values",
        formula="packets + 16·d: packets read once; model and momentum read and written",
        build=build_server_step,
        sizes={"clients": 32, "numel": 1_000_000},
        tiny={"clients": 4, "numel": 5003},
        bound="copy",
        hot=True,
    ),
    Case(
        name="vote_31x1m",
        family="packets",
        title="majority vote of 31 packets of signs, 1,000,000 values",
        formula="n·d/8 + 4·d: bits read once, the votes written as float32",
        build=build_vote,
        sizes={"clients": 31, "numel": 1_000_000},
        tiny={"clients": 5, "numel": 5003},
        hot=True,
        note="The peers start from the bits as one array.",
    ),
]
