"""Bags of rows of quantised embedding tables, beside torch's own tables and its gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_bags", "build_scatter"]

PACKED = {4: "4bit", 8: "byte"}  # torch.ops.quantized.embedding_bag_*


def _entries(setup: Setup, rows: int, bags: int, entries: int) -> tuple[np.ndarray, np.ndarray]:
    index = setup.rng().integers(0, rows, bags * entries)
    return index, np.arange(bags, dtype=np.int64) * entries


def build_bags(
    setup: Setup, *, bits: int, rows: int, width: int, bags: int, entries: int
) -> Workload:
    """Sum `entries` random rows into each of `bags` bags."""
    from flcore.ops import qembedding
    from flcore.quantization import quantize

    w = setup.rng().standard_normal((rows, width), np.float32)
    index, offsets = _entries(setup, rows, bags, entries)
    table = quantize(w, f"int{bits}")
    want = qembedding(table, index, offsets)
    scale = np.abs(want).max()

    def near(error: float, slot: int, result: np.ndarray) -> str | None:
        return difference(result.reshape(-1), want.reshape(-1), float(error * scale))

    contestants = [
        Contestant("flcore", lambda slot: qembedding(table, index, offsets), kind="ours")
    ]
    absent = {}
    torch: Any
    torch, why = optional("torch")
    if torch is None:
        absent["torch"] = why
    else:
        ids, starts = torch.from_numpy(index), torch.from_numpy(offsets)
        plain = torch.from_numpy(w)
        quantized = torch.ops.quantized
        packed = getattr(quantized, f"embedding_bag_{PACKED[bits]}_prepack")(plain)
        bag = getattr(quantized, f"embedding_bag_{PACKED[bits]}_rowwise_offsets")
        # other roundings than ours: alike within the error of the format
        contestants += [
            Contestant(
                f"torch quantized.embedding_bag_{PACKED[bits]}",
                lambda slot: bag(packed, ids, starts, False, 0, False, None, None, False),
                lambda result: result.numpy(),
                matches=partial(near, 0.5),
            ),
            Contestant(
                "torch float32 embedding_bag",
                lambda slot: torch.nn.functional.embedding_bag(ids, plain, starts, mode="sum"),
                lambda result: result.numpy(),
                matches=partial(near, 0.5),
            ),
        ]
    moved = bags * entries * (table.codes.shape[1] + 2 + 8) + 4 * bags * width
    return Workload(contestants, partial(near, 1e-6), moved, absent)


def build_scatter(setup: Setup, *, rows: int, width: int, bags: int, entries: int) -> Workload:
    """Gradients of the rows that were met, from those of the bags."""
    from flcore.ops import qembedding_grad

    index, offsets = _entries(setup, rows, bags, entries)
    grad = setup.rng().standard_normal((bags, width), np.float32)
    out = np.zeros((rows, width), np.float32)
    want = qembedding_grad(grad, index, offsets, rows=rows)

    def ours(slot: int) -> np.ndarray:
        out[...] = 0
        qembedding_grad(grad, index, offsets, rows=rows, out=out)
        return out

    def matches(slot: int, result: np.ndarray) -> str | None:
        return difference(result.reshape(-1), want.reshape(-1), 1e-4)

    def numpy_add(slot: int) -> np.ndarray:
        out[...] = 0
        np.add.at(out, index, np.repeat(grad, entries, axis=0))
        return out

    contestants = [
        Contestant("flcore", ours, kind="ours"),
        Contestant("numpy add.at", numpy_add),
    ]
    absent = {}
    torch: Any
    torch, why = optional("torch")
    if torch is None:
        absent["torch index_add_"] = why
    else:
        ids, upstream, sums = torch.from_numpy(index), torch.from_numpy(grad), torch.from_numpy(out)

        def index_add(slot: int) -> Any:
            sums.zero_()
            return sums.index_add_(0, ids, upstream.repeat_interleave(entries, 0))

        contestants.append(Contestant("torch index_add_", index_add, lambda result: result.numpy()))
    return Workload(contestants, matches, 4 * width * (bags + 2 * rows), absent)


def _bags(bits: int) -> Case:
    return Case(
        name=f"embedding_bag_int{bits}",
        family="embedding",
        title=f"4,096 bags of 32 rows, table 400,000 x 128 in {bits} bits",
        formula="rows of the entries read with scale and index, bags written",
        build=partial(build_bags, bits=bits),
        sizes={"rows": 400_000, "width": 128, "bags": 4096, "entries": 32},
        tiny={"rows": 300, "width": 40, "bags": 9, "entries": 5},
        bound="read",
    )


CASES = [
    _bags(4),
    _bags(8),
    Case(
        name="embedding_scatter",
        family="embedding",
        title="gradient of a table 50,000 x 128 from 4,096 bags of 32 rows",
        formula="gradients of the bags read, the table's zeroed and written",
        build=build_scatter,
        sizes={"rows": 50_000, "width": 128, "bags": 4096, "entries": 32},
        tiny={"rows": 300, "width": 40, "bags": 9, "entries": 5},
        bound="copy",
    ),
]
