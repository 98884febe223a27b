"""Products with quantized weights on a GPU, by Triton and CUDA, beside whole weights in torch.

Weights and their codes are drawn on the device; there are so many that none is in the L2 cache
when its turn comes. The bound is one read of codes, scales and x and one write of y.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from flcore import _variants
from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_forward", "build_gradient", "build_integers"]

VARIANTS = ("cuda", "triton")  # the first that can run is what a call without a name takes
PART = 2.0**-9  # bfloat16 of the result and of what peers make of a weight
Check = Callable[[int, np.ndarray], "str | None"]


class _Inputs:
    """Rows of x in bfloat16, and weights of random codes on the device of the setup."""

    def __init__(self, setup: Setup, m: int, width: int, n: int, k: int, scheme: str) -> None:
        from flcore.quantization import QuantizedTensor, Scheme

        torch: Any = optional("torch")[0]
        self.torch, device = torch, setup.device
        found = Scheme.of(scheme)
        draw = torch.Generator(device).manual_seed(setup.seed)
        blocks, chunks = -(-n // 16), -(-k // 32)
        groups = -(-k // found.group_size(k))
        self.weights: list[Any] = []
        for _ in range(setup.cold_slots(n * k * found.bits // 8)):
            shape = (blocks, chunks, 64 * found.bits)
            codes = torch.randint(256, shape, generator=draw, device=device, dtype=torch.uint8)
            scales = torch.rand((blocks, groups, 16), generator=draw, device=device) / 64 + 0.01
            scales = scales.to(getattr(torch, found.scale_dtype))
            zeros = None
            if found.kind == "integer_zero":
                zeros = torch.full(scales.shape, 7, dtype=torch.uint8, device=device)
            part = QuantizedTensor.from_parts((n, k), found, codes, scales, zeros, layout="tile16")
            self.weights.append(part)
        self.x = torch.randn((m, width), generator=draw, device=device).to(torch.bfloat16)
        self.bytes_moved = self.weights[0].nbytes + 2 * m * (n + k)

    def check(self, gradient: bool, part: float) -> Check:
        """Return the check of results; `part`: of the length of a sum's terms."""

        def matches(slot: int, result: np.ndarray) -> str | None:
            w, x = self.weights[slot].dequantize("float64"), self.x.double()
            w = w.to(x.device) if gradient else w.to(x.device).T
            want = (x @ w).cpu().numpy()
            length = (x.norm(dim=1)[:, None] * w.norm(dim=0)).cpu().numpy()
            allowed = 2 * PART * np.abs(want) + part * length
            return difference(result.reshape(-1), want.reshape(-1), allowed.reshape(-1))

        return matches

    def wholes(self, setup: Setup) -> list[Any]:
        """Weights in bfloat16 for peers."""
        n, k = self.weights[0].shape
        count = min(len(self.weights), setup.cold_slots(2 * n * k))
        kind = self.torch.bfloat16
        return [w.dequantize(kind).to(self.x.device) for w in self.weights[:count]]

    def workload(
        self, setup: Setup, op: str, peers: list[Contestant], check: Check, **options: Any
    ) -> Workload:
        """Return ours by every variant that can run, and the peers."""
        from flcore import ops

        function: Any = getattr(ops, op)
        ours: list[Contestant] = []
        absent = {}
        for variant in VARIANTS:
            why = _variants.available(op, setup.device).get(variant, "there is no such variant")
            if why:
                absent[f"flcore {variant}"] = why
                continue
            call = partial(self._call, function, variant=variant, **options)
            kind = "variant" if ours else "ours"
            ours.append(Contestant(f"flcore {variant}", call, _numpy, kind=kind))
        slots = len(self.weights)
        return Workload([*ours, *peers], check, self.bytes_moved, absent, slots=slots)

    def _call(self, function: Callable[..., Any], slot: int, **options: Any) -> Any:
        return function(self.x, self.weights[slot], **options)


def _numpy(result: Any) -> np.ndarray:
    return np.asarray(result.double().cpu().numpy())


def build_forward(setup: Setup, *, m: int, n: int, k: int, scheme: str) -> Workload:
    """``y = x W^T`` beside a whole weight in bfloat16."""
    inputs = _Inputs(setup, m, k, n, k, scheme)
    torch, wholes = inputs.torch, inputs.wholes(setup)

    def linear(slot: int) -> Any:
        return torch.nn.functional.linear(inputs.x, wholes[slot % len(wholes)])

    check = inputs.check(False, PART)
    peers = [Contestant("torch F.linear bfloat16", linear, _numpy, matches=check)]
    return inputs.workload(setup, "qmatmul", peers, check)


def build_gradient(setup: Setup, *, m: int, n: int, k: int, scheme: str) -> Workload:
    """``dX = dY W`` beside writing the whole weight back and multiplying by it."""
    inputs = _Inputs(setup, m, n, n, k, scheme)
    wholes = inputs.wholes(setup)
    check = inputs.check(True, PART)
    peers = [
        Contestant(
            "torch matmul, whole bfloat16 weight",
            lambda slot: inputs.x @ wholes[slot % len(wholes)],
            _numpy,
            matches=check,
        )
    ]
    return inputs.workload(setup, "qmatmul_dx", peers, check)


def build_integers(setup: Setup, *, m: int, n: int, k: int) -> Workload:
    """Eight bits on both sides, one scale a row, quantisation of x included."""
    inputs = _Inputs(setup, m, k, n, k, "int8")
    torch, x = inputs.torch, inputs.x
    check = inputs.check(False, 2.0**-6)
    peers, absent = [], {}
    name = "torch quantise, _int_mm, scale"
    if m > 16:  # what _int_mm takes
        codes, scales = [], []
        for w in inputs.weights:
            scales.append(w.scales.reshape(1, -1)[:, :n])
            whole = w.dequantize(torch.float32).to(x.device)
            codes.append(torch.round(whole / scales[-1].t()).to(torch.int8).t())

        def product(slot: int) -> Any:
            scale = x.abs().amax(1, keepdim=True).float() / 127
            q = torch.round(x / scale).to(torch.int8)
            return (torch._int_mm(q, codes[slot]) * scale * scales[slot]).to(x.dtype)

        peers.append(Contestant(name, product, _numpy, matches=check))
    else:
        absent[name] = "it takes more than 16 rows"
    workload = inputs.workload(setup, "qmatmul_int8", peers, check, act_block=0)
    workload.absent.update(absent)
    return workload


def _case(kind: str, m: int, n: int, k: int, scheme: str) -> Case:
    build: Any = {"w": build_forward, "dx": build_gradient, "w8a8": build_integers}[kind]
    extra = {} if kind == "w8a8" else {"scheme": scheme}
    product = "dX = dY W" if kind == "dx" else "y = x W^T"
    bits = ", x to 8 bits in the call" if kind == "w8a8" else ""
    return Case(
        name=f"gpu_{kind}_{scheme}_{n}x{k}_m{m}",
        family="qmatmul",
        title=f"{product}, {m} row{'s' * (m > 1)}, W {n} x {k} {scheme}, bfloat16{bits}",
        formula="n·k·bits/8 + scales + x + y",
        build=build,
        sizes={"m": m, "n": n, "k": k, **extra},
        tiny={"m": min(m, 5), "n": 32, "k": 256, **extra},
        dtype="bfloat16",
        devices=("cuda",),
        needs=("torch",),
    )


CASES = [
    *(_case("w", m, 4096, 4096, "int4") for m in (1, 16, 64, 1024)),
    *(_case("w", m, 11008, 4096, "int4") for m in (1, 16)),
    *(_case("w", m, 4096, 4096, "nf4") for m in (1, 64)),
    _case("w", 1, 4096, 4096, "int8"),
    _case("w", 1, 4096, 4096, "int2"),
    *(_case("w8a8", m, 4096, 4096, "int8") for m in (1, 64, 1024)),
    *(_case("dx", m, 4096, 4096, "int4") for m in (16, 1024)),
]
