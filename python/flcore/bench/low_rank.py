"""Cases of the low_rank family: factors with error feedback, count sketches and what they tell.

The peers keep the same state; flcore also writes the checked packet, they stop at arrays. Peers of
the sketches read tables of columns and signs that were made before: 12 bytes a value and row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_factors", "build_sketch", "build_top_k"]

GRADIENTS = 2


def _compiled(
    torch: Any, setup: Setup, name: str, step: Callable[..., Any], absent: dict[str, str]
) -> Any:
    if setup.compiled:
        return torch.compile(step)
    absent[name] = "left out on request"
    return None


# ---- factors -------------------------------------------------------------------------------------


def build_factors(setup: Setup, *, layers: int, n: int, m: int, rank: int) -> Workload:
    """One client's uplink: error feedback and two factors of every layer, warm started."""
    from flcore.compression import EF14, Encoder, LowRank, decode
    from flcore.ops.low_rank import Plan, revive

    rng = setup.rng()
    updates = [rng.standard_normal((layers, n, m), dtype=np.float32) for _ in range(GRADIENTS)]
    split = [list(u) for u in updates]
    plan = Plan.of([(n, m)] * layers, [rank] * layers)
    begin = revive(plan, None, 0, 0).reshape(layers, rank, m)
    encoder = Encoder(LowRank(rank=rank, min_compression=0.0), EF14(), like=split[0])
    packet_bytes = encoder.encode(split[0], round=0, seed=0).nbytes

    ours = Contestant(
        "flcore Encoder.encode",
        lambda slot: encoder.encode(split[slot], round=0, seed=0),
        to_numpy=lambda packet: np.asarray(decode(packet)),
        reset=encoder.reset,
        kind="ours",
    )
    wide = updates[0].astype(np.float64)
    p = np.linalg.qr(wide @ begin.transpose(0, 2, 1).astype(np.float64))[0]
    expected = (p @ (p.transpose(0, 2, 1) @ wide)).reshape(-1)
    contestants, absent = [ours, _numpy_factors(updates, begin)], {}
    torch, reason = optional("torch")
    eager, compiled = "torch PowerSGD chain", "torch.compile of the chain"
    if torch is None:
        absent = dict.fromkeys((eager, compiled), reason)
    else:
        contestants.append(_torch_factors(torch, updates, begin, eager, _torch_step(torch)))
        if wrapped := _compiled(torch, setup, compiled, _torch_step(torch), absent):
            contestants.append(_torch_factors(torch, updates, begin, compiled, wrapped))
    return Workload(
        contestants=contestants,
        matches=lambda slot, result: difference(result, expected, 1e-3),
        bytes_moved=12 * updates[0].size + packet_bytes,
        absent=absent,
        slots=GRADIENTS,
    )


def _numpy_factors(updates: list[np.ndarray], begin: np.ndarray) -> Contestant:
    e, q = np.zeros_like(updates[0]), begin.transpose(0, 2, 1).copy()

    def step(slot: int) -> np.ndarray:
        u = updates[slot] + e
        p = np.linalg.qr(u @ q)[0]
        q[...] = u.transpose(0, 2, 1) @ p
        sent = p @ q.transpose(0, 2, 1)
        np.subtract(u, sent, out=e)
        return sent

    def reset() -> None:
        e.fill(0)
        q[...] = begin.transpose(0, 2, 1)

    return Contestant("numpy chain", step, lambda sent: sent.reshape(-1), reset)


def _torch_step(torch: Any) -> Callable[..., Any]:
    def step(g: Any, e: Any, q: Any) -> Any:
        u = g + e
        p = torch.linalg.qr(torch.bmm(u, q))[0]
        q.copy_(torch.bmm(u.transpose(1, 2), p))
        sent = torch.bmm(p, q.transpose(1, 2))
        e.copy_(u - sent)
        return sent

    return step


def _torch_factors(
    torch: Any, updates: list[np.ndarray], begin: np.ndarray, name: str, step: Callable[..., Any]
) -> Contestant:
    inputs = [torch.from_numpy(u) for u in updates]
    first = torch.from_numpy(begin).transpose(1, 2).contiguous()
    e, q = torch.zeros_like(inputs[0]), first.clone()

    def reset() -> None:
        e.zero_()
        q.copy_(first)

    return Contestant(
        name,
        lambda slot: step(inputs[slot], e, q),
        lambda sent: sent.reshape(-1).numpy(),
        reset,
    )


# ---- sketches ------------------------------------------------------------------------------------


def _places(numel: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns (int64) and signs (float32) of all coordinates, as peers keep them."""
    from flcore.reference.sketch import places

    parts = [
        places(np.arange(at, min(at + 2**18, numel)), 0, rows, columns)
        for at in range(0, numel, 2**18)
    ]
    return np.hstack([p[0] for p in parts]), np.hstack([p[1] for p in parts])


def build_sketch(setup: Setup, *, numel: int, rows: int, columns: int) -> Workload:
    """One client's uplink: the count sketch of an update."""
    from flcore.ops.sketch import sketch

    rng = setup.rng()
    updates = [rng.standard_normal(numel, dtype=np.float32) for _ in range(GRADIENTS)]
    column, sign = _places(numel, rows, columns)

    def expected(slot: int) -> np.ndarray:
        u = updates[slot].astype(np.float64)
        found = [np.bincount(c, s * u, columns) for c, s in zip(column, sign, strict=True)]
        return np.concatenate(found)

    def with_numpy(slot: int) -> np.ndarray:
        u = updates[slot]
        found = [np.bincount(c, s * u, columns) for c, s in zip(column, sign, strict=True)]
        return np.array(found, np.float32)

    contestants = [
        Contestant(
            "flcore sketch",
            lambda slot: sketch(updates[slot], rows=rows, columns=columns),
            lambda table: table.reshape(-1),
            kind="ours",
        ),
        Contestant("numpy bincount a row", with_numpy, lambda table: table.reshape(-1)),
    ]
    absent = {}
    torch, reason = optional("torch")
    if torch is None:
        absent["torch scatter_add"] = reason
    else:
        inputs = [torch.from_numpy(u) for u in updates]
        where, signs = torch.from_numpy(column), torch.from_numpy(sign)

        def with_torch(slot: int) -> Any:
            table = torch.zeros(rows, columns)
            return table.scatter_add_(1, where, signs * inputs[slot])

        contestants.append(
            Contestant("torch scatter_add", with_torch, lambda table: table.reshape(-1).numpy())
        )
    wanted = expected(0)
    return Workload(
        contestants=contestants,
        matches=lambda slot, result: difference(result, wanted, 1e-5 * np.sqrt(numel / columns)),
        bytes_moved=4 * numel + 4 * rows * columns,
        absent=absent,
        slots=GRADIENTS,
    )


def build_top_k(setup: Setup, *, numel: int, rows: int, columns: int, k: int) -> Workload:
    """Server's side: the k coordinates that a table says are largest."""
    from flcore.ops.sketch import sketch, sketch_top_k

    rng = setup.rng()
    u = rng.standard_normal(numel, dtype=np.float32)
    u[rng.choice(numel, k, replace=False)] *= 100
    table = sketch(u, rows=rows, columns=columns)
    column, sign = _places(numel, rows, columns)

    def dense(pair: tuple[Any, Any]) -> np.ndarray:
        out = np.zeros(numel, np.float32)
        out[np.asarray(pair[0])] = np.asarray(pair[1])
        return out

    def with_numpy(slot: int) -> tuple[np.ndarray, np.ndarray]:
        estimates = np.median(sign * np.take_along_axis(table, column, axis=1), axis=0)
        index = np.argpartition(np.abs(estimates), numel - k)[numel - k :]
        return index, estimates[index]

    contestants = [
        Contestant(
            "flcore sketch_top_k", lambda slot: sketch_top_k(table, numel, k), dense, kind="ours"
        ),
        Contestant("numpy median and argpartition", with_numpy, dense),
    ]
    absent = {}
    torch, reason = optional("torch")
    if torch is None:
        absent["torch gather, median, topk"] = reason
    else:
        cells, where, signs = (torch.from_numpy(x) for x in (table, column, sign))

        def with_torch(slot: int) -> tuple[Any, Any]:
            estimates = (signs * torch.gather(cells, 1, where)).median(dim=0).values
            index = torch.topk(estimates.abs(), k, sorted=False).indices
            return index, estimates[index]

        contestants.append(Contestant("torch gather, median, topk", with_torch, dense))
    wanted = dense(sketch_top_k(table, numel, k, variant="reference"))
    return Workload(
        contestants=contestants,
        matches=lambda slot, result: difference(result, wanted, 1e-6),
        bytes_moved=4 * rows * columns + 12 * k,
        absent=absent,
    )


CASES = [
    Case(
        name="low_rank_ef14_10m",
        family="low_rank",
        title="EF14 + rank-2 factors, 10 matrices of 1000 x 1000",
        formula="12·d + packet: read e and g, write e; factors are small",
        build=build_factors,
        sizes={"layers": 10, "n": 1000, "m": 1000, "rank": 2},
        tiny={"layers": 2, "n": 40, "m": 30, "rank": 2},
        bound="copy",
        note="flcore reads update and error three times and stores neither U nor P Q^T.",
    ),
    Case(
        name="sketch_5x100k_10m",
        family="low_rank",
        title="count sketch 5 x 100,000 of 10,000,000 values",
        formula="4·d + table; the 5 scattered adds a value bound it, not memory",
        build=build_sketch,
        sizes={"numel": 10_000_000, "rows": 5, "columns": 100_000},
        tiny={"numel": 5_003, "rows": 5, "columns": 100},
        bound="read",
        note="The peers read hash tables of 12 bytes a value and row, flcore computes hashes.",
    ),
    Case(
        name="sketch_top_k_10m",
        family="low_rank",
        title="10,000 largest of 10,000,000 estimates, table 5 x 100,000",
        formula="table + entries: no estimate is stored",
        build=build_top_k,
        sizes={"numel": 10_000_000, "rows": 5, "columns": 100_000, "k": 10_000},
        tiny={"numel": 5_003, "rows": 5, "columns": 500, "k": 20},
        bound="read",
        hot=True,
        note="The peers hold all 5 estimates of every value at once, 200 MB.",
    ),
]
