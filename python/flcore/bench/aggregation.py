"""Cases of the aggregation family: the weighted mean of client updates, at once and streaming.

Stacking is given to `weights @ stacked` free of charge, although a server that receives one update
after another has to pay for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from flcore.bench import aggregation_peers as peers
from flcore.bench.cases import Case, Setup, Workload
from flcore.bench.timers import Contestant
from flcore.bench.updates import UNIT_ROUNDOFF, Updates, make_updates, to_numpy

__all__ = ["CASES", "RESNET18_SHAPES", "build_accumulator", "build_mean"]


def _resnet18_shapes() -> list[tuple[int, ...]]:
    """Return the 62 parameter shapes of the ImageNet ResNet-18: 11,689,512 values."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            before = channels if block == 0 else width
            shapes += [(width, before, 3, 3), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            if before != width:
                shapes += [(width, before, 1, 1), (width,), (width,)]
        channels = width
    return [*shapes, (1000, 512), (1000,)]


RESNET18_SHAPES = _resnet18_shapes()


def _ours(data: Updates, setup: Setup) -> list[Contestant]:
    """Flcore's contestants: the plain call first, then the same with other options."""
    from flcore.aggregation import Mean

    mean, updates, weights = Mean(), data.updates(), data.weights.tolist()

    def plain(slot: int) -> Any:
        return mean(updates[slot], weights)

    contestants = [Contestant("flcore Mean", plain, to_numpy, kind="ours")]

    def variant(name: str, call: Callable[[int], Any]) -> None:
        contestants.append(Contestant(f"flcore Mean, {name}", call, to_numpy, kind="variant"))

    if data.shapes is None:
        variant("stacked input", lambda slot: mean(data.stacked[slot], weights))
        out = data.stacked[0][0] * 0
        variant("out=", lambda slot: mean(updates[slot], weights, out=out))
    if data.dtype != "float32":
        wide = data.updates(lambda matrix: matrix.float())
        variant("same values in float32", lambda slot: mean(wide[slot], weights))
    if setup.device == "cuda":
        unchecked = Mean(nonfinite="propagate")
        variant('nonfinite="propagate"', lambda slot: unchecked(updates[slot], weights))

        def named(name: str, slot: int) -> Any:
            return mean(updates[slot], weights, variant=name)

        for name in ("triton", "cuda"):
            variant(name, partial(named, name))
    return contestants


def build_mean(
    setup: Setup,
    *,
    clients: int,
    numel: int = 0,
    dtype: str = "float32",
    hot: bool = False,
    shapes: list[tuple[int, ...]] | None = None,
) -> Workload:
    """Weighted mean of resident updates, flat or as lists of layers."""
    if shapes is not None:
        numel = sum(int(np.prod(shape)) for shape in shapes)
    data = make_updates(setup, clients, numel, dtype, hot, shapes)
    others, absent = peers.mean_peers(data, setup)
    itemsize = 4 if dtype == "float32" else 2
    return Workload(
        contestants=_ours(data, setup) + others,
        matches=data.check(UNIT_ROUNDOFF["float32"]),
        bytes_moved=(clients + 1) * numel * itemsize,
        absent=absent,
        slots=len(data.stacked),
    )


def build_accumulator(setup: Setup, *, clients: int, numel: int) -> Workload:
    """Streaming mean: updates arrive one by one and are folded into one accumulator."""
    from flcore.aggregation import Accumulator

    data = make_updates(setup, clients, numel, "float32")
    updates, weights = data.updates(), [float(q) for q in data.weights]
    checking = Accumulator(updates[0][0])
    trusting = Accumulator(updates[0][0], nonfinite="propagate")

    def stream(accumulator: Accumulator, slot: int) -> Any:
        accumulator.reset()
        for update, weight in zip(updates[slot], weights, strict=True):
            accumulator.add(update, weight)
        return accumulator.result()

    ours = [
        Contestant("flcore Accumulator", partial(stream, checking), to_numpy, kind="ours"),
        Contestant(
            "flcore Accumulator, nonfinite='propagate' (as the peers: values are not checked)",
            partial(stream, trusting),
            to_numpy,
            kind="variant",
        ),
    ]
    others, absent = peers.streaming_peers(data, setup)
    return Workload(
        contestants=ours + others,
        matches=data.check(UNIT_ROUNDOFF["float32"]),
        bytes_moved=(12 * clients + 8) * numel,
        absent=absent,
        slots=len(data.stacked),
    )


_BOTH = ("cpu", "cuda")
_HALF_NOTE = (
    "`weights @ stacked` rounds the weights to the type of the inputs, `_foreach_add_` every "
    "partial sum; both are verified with the wider bound that this needs."
)
_TINY = {"clients": 4, "numel": 4099}


def _mean_case(name: str, title: str, sizes: dict[str, Any], **options: Any) -> Case:
    fixed = {key: sizes[key] for key in ("dtype", "hot") if key in sizes}
    width = 4 if sizes.get("dtype", "float32") == "float32" else 2
    return Case(
        name=name,
        family="aggregation",
        title=title,
        formula=f"{width}·(n + 1)·d: every update read once, the mean written once",
        build=build_mean,
        sizes=sizes,
        tiny=options.pop("tiny", _TINY | fixed),
        dtype=sizes.get("dtype", "float32"),
        hot=sizes.get("hot", False),
        **options,
    )


CASES = [
    _mean_case(
        "weighted_mean_32x1m",
        "weighted mean, 32 clients x 1,000,000",
        {"clients": 32, "numel": 1_000_000},
        devices=_BOTH,
    ),
    _mean_case(
        "weighted_mean_8x1m",
        "weighted mean, 8 clients x 1,000,000",
        {"clients": 8, "numel": 1_000_000},
        devices=_BOTH,
    ),
    _mean_case(
        "weighted_mean_32x100k",
        "weighted mean, 32 clients x 100,000 (in cache)",
        {"clients": 32, "numel": 100_000, "hot": True},
        note="The inputs stay in cache: more than 100 % of the memory bandwidth is possible.",
    ),
    _mean_case(
        "weighted_mean_32x1m_bf16",
        "weighted mean, 32 clients x 1,000,000, bfloat16",
        {"clients": 32, "numel": 1_000_000, "dtype": "bfloat16"},
        devices=_BOTH,
        needs=("torch",),
        note=_HALF_NOTE,
    ),
    _mean_case(
        "weighted_mean_32x1m_fp16",
        "weighted mean, 32 clients x 1,000,000, float16",
        {"clients": 32, "numel": 1_000_000, "dtype": "float16"},
        devices=_BOTH,
        needs=("torch",),
        note=_HALF_NOTE,
    ),
    _mean_case(
        "weighted_mean_8xresnet18",
        "weighted mean, 8 clients x ResNet-18 (62 layers, 11.7 M)",
        {"clients": 8, "shapes": RESNET18_SHAPES},
        tiny={"clients": 3, "shapes": [(8, 3, 3), (8,), (17,), (5, 4)]},
        devices=_BOTH,
        note="Updates are lists of layers; nobody concatenates them.",
    ),
    _mean_case(
        "weighted_mean_32x8m",
        "weighted mean, 32 clients x 8,000,000",
        {"clients": 32, "numel": 8_000_000},
        devices=("cuda",),
    ),
    Case(
        name="accumulator_32x1m",
        family="aggregation",
        title="streaming mean, 32 arrivals x 1,000,000",
        formula="(12·n + 8)·d: each arrival reads the update and reads and writes the accumulator",
        build=build_accumulator,
        sizes={"clients": 32, "numel": 1_000_000},
        tiny=_TINY,
        bound="copy",
        devices=_BOTH,
        note="The accumulator (4 MB) may stay in cache between arrivals: above 100 % is possible.",
    ),
]
