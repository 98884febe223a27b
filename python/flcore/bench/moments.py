"""Cases of the moments family: mean and variance of a vector or of layers, alone or while adding.

The peers sum in float32 and get a wider bound; NumPy takes several passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from flcore.bench.aggregation import RESNET18_SHAPES
from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_accumulate", "build_moments"]

WEIGHT = 0.5


def _inputs(setup: Setup, shapes: list[tuple[int, ...]]) -> list[list[Any]]:
    """Normal values around 1, `[slot][layer]`; every layer is a view of one vector."""
    torch: Any = optional("torch")[0]  # there whenever the device is a GPU
    sizes = [int(np.prod(shape)) for shape in shapes]
    ends = np.cumsum(sizes)
    rng, slots = setup.rng(), []
    for _ in range(setup.cold_slots(4 * int(ends[-1]))):
        flat: Any = rng.standard_normal(int(ends[-1]), dtype=np.float32) + np.float32(1)
        if setup.device == "cuda":
            flat = torch.from_numpy(flat).cuda()
        slots.append(
            [flat[e - n : e].reshape(s) for n, e, s in zip(sizes, ends, shapes, strict=True)]
        )
    return slots


def _host(x: Any) -> np.ndarray:
    return np.asarray(x.double().cpu() if hasattr(x, "cpu") else x, dtype=np.float64).reshape(-1)


def _flat(result: Any) -> np.ndarray:
    """Means of the layers, then their variances, then what was accumulated."""
    return np.concatenate([_host(part) for part in result])


def _expected(layers: list[Any]) -> np.ndarray:
    wide = [_host(x) for x in layers]
    return np.array([[x.mean() for x in wide], [x.var() for x in wide]])


def _check(
    slots: list[list[Any]], rounding: float, added: bool = False
) -> Callable[[int, np.ndarray], str | None]:
    """Compare with float64: within `rounding` of the scale of the values, which is 1."""
    known: dict[int, np.ndarray] = {}

    def matches(slot: int, result: np.ndarray) -> str | None:
        if slot not in known:
            parts = [*_expected(slots[slot])]
            if added:
                parts.append(WEIGHT * np.concatenate([_host(x) for x in slots[slot]]))
            known[slot] = np.concatenate(parts)
        allowed = np.full(known[slot].shape, rounding)
        allowed[2 * len(slots[slot]) :] = 1e-6
        return difference(result, known[slot], allowed)

    return matches


def _torch_tensors(setup: Setup, slots: list[list[Any]]) -> tuple[Any, list[list[Any]], str]:
    torch, reason = optional("torch")
    if torch is None or setup.device == "cuda":
        return torch, slots, reason
    return torch, [[torch.from_numpy(x) for x in layers] for layers in slots], reason


def build_moments(setup: Setup, *, shapes: list[tuple[int, ...]]) -> Workload:
    """Mean and variance of every layer of one update."""
    from flcore.ops import moments

    slots = _inputs(setup, shapes)

    def ours(slot: int) -> Any:
        m = moments(slots[slot])
        return m.mean, m.variance()

    contestants = [Contestant("flcore moments", ours, _flat, kind="ours")]
    coarse, absent = _check(slots, 2e-4), {}
    torch, tensors, reason = _torch_tensors(setup, slots)
    if torch is None:
        absent["torch var_mean"] = reason
    else:

        def with_torch(slot: int) -> Any:
            pairs = [torch.var_mean(x, correction=0) for x in tensors[slot]]
            return torch.stack([m for _, m in pairs]), torch.stack([v for v, _ in pairs])

        contestants.append(Contestant("torch var_mean", with_torch, _flat, matches=coarse))
    if setup.device == "cuda":
        absent["numpy mean, var"] = "no CUDA arrays in NumPy"
    else:

        def with_numpy(slot: int) -> Any:
            return [x.mean() for x in slots[slot]], [x.var() for x in slots[slot]]

        contestants.append(Contestant("numpy mean, var", with_numpy, _flat, matches=coarse))
    return Workload(
        contestants=contestants,
        matches=_check(slots, 1e-12),
        bytes_moved=4 * sum(int(np.prod(shape)) for shape in shapes),
        absent=absent,
        slots=len(slots),
    )


def build_accumulate(setup: Setup, *, numel: int) -> Workload:
    """Add a weighted vector to an accumulator and take its moments."""
    from flcore.ops import accumulate_moments

    slots = _inputs(setup, [(numel,)])
    acc = slots[0][0] * 0

    def clear() -> None:
        acc[...] = 0

    def ours(slot: int, nonfinite: str) -> Any:
        m = accumulate_moments(acc, slots[slot][0], WEIGHT, nonfinite=nonfinite)
        return m.mean, m.variance(), acc

    name = "flcore accumulate_moments"
    contestants = [
        Contestant(
            f"{name}, nonfinite='propagate'",
            partial(ours, nonfinite="propagate"),
            _flat,
            reset=clear,
            kind="ours",
        ),
        Contestant(
            f"{name}, checking first",
            partial(ours, nonfinite="raise"),
            _flat,
            clear,
            kind="variant",
        ),
    ]
    coarse, absent = _check(slots, 2e-4, added=True), {}
    torch, tensors, reason = _torch_tensors(setup, [[acc], *slots])
    if torch is None:
        absent["torch add_, var_mean"] = reason
    else:
        (total,), *rows = tensors

        def with_torch(slot: int) -> Any:
            total.add_(rows[slot][0], alpha=WEIGHT)
            variance, mean = torch.var_mean(rows[slot][0], correction=0)
            return mean, variance, total

        contestants.append(
            Contestant("torch add_, var_mean", with_torch, _flat, reset=clear, matches=coarse)
        )
    if setup.device == "cuda":
        absent["numpy +=, mean, var"] = "no CUDA arrays in NumPy"
    else:

        def with_numpy(slot: int) -> Any:
            x, total = slots[slot][0], acc
            total += np.float32(WEIGHT) * x
            return x.mean(), x.var(), total

        contestants.append(
            Contestant("numpy +=, mean, var", with_numpy, _flat, reset=clear, matches=coarse)
        )
    return Workload(
        contestants=contestants,
        matches=_check(slots, 1e-12, added=True),
        bytes_moved=12 * numel,
        absent=absent,
        slots=len(slots),
    )


_BOTH = ("cpu", "cuda")

CASES = [
    Case(
        name="moments_10m",
        family="moments",
        title="mean and variance, 10,000,000 values",
        formula="4·d: every value read once",
        build=build_moments,
        sizes={"shapes": [(10_000_000,)]},
        tiny={"shapes": [(10_007,)]},
        devices=_BOTH,
        note="flcore sums in float64, the peers in float32.",
    ),
    Case(
        name="moments_resnet18",
        family="moments",
        title="mean and variance of each layer of ResNet-18 (62 layers, 11.7 M)",
        formula="4·d: every value read once",
        build=build_moments,
        sizes={"shapes": RESNET18_SHAPES},
        tiny={"shapes": [(8, 3, 3), (8,), (17, 300), (5, 4)]},
        devices=_BOTH,
        note="The peers are called once a layer.",
    ),
    Case(
        name="accumulate_moments_10m",
        family="moments",
        title="acc += w x with mean and variance of x, 10,000,000 values",
        formula="12·d: x read once, the accumulator read and written",
        build=build_accumulate,
        sizes={"numel": 10_000_000},
        tiny={"numel": 10_007},
        bound="copy",
        devices=_BOTH,
    ),
]
