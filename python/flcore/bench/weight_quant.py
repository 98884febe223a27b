"""Making and undoing low-bit weights: `flcore.quantization` beside the torch code people write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_dequantize", "build_quantize", "build_repack"]

Parts = tuple[Any, Any, Any]


def _torch_affine(torch: Any, w: Any, group: int) -> Parts:
    """Quantise to 4 bits with integer zeros, operation by operation."""
    n, k = w.shape
    g = w.view(n, k // group, group)
    low, high = g.amin(-1, keepdim=True).clamp(max=0), g.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    q = ((g / scale).round() + zero).clamp(0, 15).to(torch.uint8).view(n, k)
    return q[:, ::2] | (q[:, 1::2] << 4), scale.view(n, -1).half(), zero.view(n, -1).to(torch.uint8)


def _torch_nf4(torch: Any, w: Any, group: int, limits: Any) -> Parts:
    """Quantise to NF4: a search among the middles of neighbouring levels."""
    n, k = w.shape
    g = w.view(n, k // group, group)
    scale = g.abs().amax(-1, keepdim=True)
    q = torch.bucketize(g / scale, limits, out_int32=True).to(torch.uint8).view(n, k)
    return q[:, ::2] | (q[:, 1::2] << 4), scale.view(n, -1), None


def _torch_dequantize(torch: Any, parts: Parts, group: int, table: Any) -> Any:
    """Unpack, subtract or look up, scale."""
    codes, scale, zero = parts
    q = torch.stack([codes & 15, codes >> 4], -1).view(codes.shape[0], -1, group)
    level = table[q.int()] if zero is None else q.float() - zero.float().unsqueeze(-1)
    return (level * scale.float().unsqueeze(-1)).view(codes.shape[0], -1)


class _Inputs:
    """Weights that all contestants share."""

    def __init__(self, setup: Setup, n: int, k: int, scheme: str, slots_of: int) -> None:
        from flcore.quantization import Scheme, quantize

        torch: Any = optional("torch")[0]
        self.torch = torch
        self.scheme = Scheme.of(scheme)
        self.slots = setup.cold_slots(slots_of)
        generator = torch.Generator().manual_seed(setup.seed)
        drawn = torch.randn(self.slots, n, k, generator=generator)
        self.weights = list(drawn)
        self.group = self.scheme.group
        self.table = self.limits = None
        if self.scheme.table is not None:
            table = torch.from_numpy(self.scheme.table)
            self.table, self.limits = table, (table[1:] + table[:-1]) / 2
        self.made = [quantize(w, self.scheme) for w in self.weights]

    def eager(self, slot: int) -> Parts:
        if self.table is None:
            return _torch_affine(self.torch, self.weights[slot], self.group)
        return _torch_nf4(self.torch, self.weights[slot], self.group, self.limits)

    def near(self, slot: int, values: np.ndarray) -> str | None:
        """Values differ from the weight by at most half of the widest gap between levels."""
        w = self.weights[slot].numpy()
        scale = np.repeat(self.made[slot].scales.float().numpy(), self.group, axis=1)
        gap = 0.5 if self.table is None else 0.152
        return difference(values.reshape(-1), w.reshape(-1), (scale * gap * 1.01).reshape(-1))

    def exact(self, slot: int, values: np.ndarray) -> str | None:
        want = self.made[slot].dequantize().numpy().reshape(-1)
        return difference(values.reshape(-1), want, 0.0)


def build_quantize(setup: Setup, *, n: int, k: int, scheme: str) -> Workload:
    """Quantise and pack a matrix."""
    from flcore.quantization import quantize

    inputs = _Inputs(setup, n, k, scheme, 4 * n * k)

    def values(parts: Parts) -> np.ndarray:
        return _torch_dequantize(inputs.torch, parts, inputs.group, inputs.table).numpy()

    def ours(name: str, layout: str, kind: str) -> Contestant:
        def call(slot: int) -> Any:
            return quantize(inputs.weights[slot], inputs.scheme, layout=layout)

        return Contestant(name, call, lambda made: made.dequantize().numpy(), kind=kind)

    contestants = [
        ours("flcore quantize", "rows", "ours"),
        ours("flcore quantize, tile16", "tile16", "variant"),
        Contestant("torch eager", inputs.eager, values),
    ]
    absent = _compiled(
        setup, inputs, lambda: inputs.torch.compile(inputs.eager), values, contestants
    )
    return Workload(
        contestants=contestants,
        matches=inputs.near,
        bytes_moved=4 * n * k + inputs.made[0].nbytes,
        absent=absent,
        slots=inputs.slots,
    )


def build_dequantize(setup: Setup, *, n: int, k: int, scheme: str) -> Workload:
    """Write the numbers that a weight stands for."""
    inputs = _Inputs(setup, n, k, scheme, 4 * n * k)
    parts = [inputs.eager(slot) for slot in range(inputs.slots)]
    outs = [inputs.torch.empty(n, k) for _ in range(inputs.slots)]

    def eager(slot: int) -> Any:
        return _torch_dequantize(inputs.torch, parts[slot], inputs.group, inputs.table)

    contestants = [
        Contestant("flcore dequantize", lambda s: inputs.made[s].dequantize(out=outs[s]),
                   kind="ours"),
        Contestant("torch eager", eager, matches=inputs.near),
    ]  # fmt: skip
    absent = _compiled(setup, inputs, lambda: inputs.torch.compile(eager), None, contestants)
    return Workload(
        contestants=contestants,
        matches=inputs.exact,
        bytes_moved=4 * n * k + inputs.made[0].nbytes,
        absent=absent,
        slots=inputs.slots,
    )


def build_repack(setup: Setup, *, n: int, k: int, scheme: str) -> Workload:
    """Bring a weight from the layout of files into that of products."""
    inputs = _Inputs(setup, n, k, scheme, n * k // 2)
    return Workload(
        contestants=[
            Contestant("flcore to_layout", lambda s: inputs.made[s].to_layout("tile16"),
                       lambda made: made.dequantize().numpy(), kind="ours")
        ],
        matches=inputs.exact,
        bytes_moved=2 * inputs.made[0].nbytes,
        slots=inputs.slots,
    )  # fmt: skip


def _compiled(
    setup: Setup,
    inputs: _Inputs,
    make: Callable[[], Callable[[int], Any]],
    to_numpy: Callable[[Any], np.ndarray] | None,
    contestants: list[Contestant],
) -> dict[str, str]:
    """Add torch.compile of the eager code, or say why it is absent."""
    if not setup.compiled:
        return {"torch.compile": "left out on request"}
    more: dict[str, Any] = {} if to_numpy is None else {"to_numpy": to_numpy}
    contestants.append(Contestant("torch.compile", make(), matches=inputs.near, **more))
    return {}


def _case(name: str, title: str, build: Callable[..., Workload], scheme: str, formula: str) -> Case:
    return Case(
        name=name,
        family="weights",
        title=f"{title}, 4096 x 4096",
        formula=formula,
        build=build,
        sizes={"n": 4096, "k": 4096, "scheme": scheme},
        tiny={"n": 33, "k": 256, "scheme": scheme},
        bound="read" if build is build_quantize else "copy",
        needs=("torch",),
    )


QUANTIZE = "4.5·n·k and scales: W read, codes written"
CASES = [
    _case("quantize_int4", "float32 to 4 bits with zeros, groups of 128", build_quantize,
          "int4-asym", QUANTIZE),
    _case("quantize_nf4", "float32 to NF4, blocks of 64", build_quantize, "nf4", QUANTIZE),
    _case("dequantize_int4", "4 bits with zeros, groups of 128, to float32", build_dequantize,
          "int4-asym", "4.5·n·k and scales: codes read, W written"),
    _case("dequantize_nf4", "NF4, blocks of 64, to float32", build_dequantize, "nf4",
          "4.5·n·k and scales: codes read, W written"),
    _case("repack_int4", "4 bits, rows to tile16", build_repack, "int4-asym",
          "n·k and twice the scales: codes read, codes written"),
]  # fmt: skip
