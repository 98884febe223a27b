"""Products of activations with weights of 2 to 8 bits beside torch and bitsandbytes.

Every call reads a weight that has left the caches: there are so many of them that all together are
four times as large. The bound is one read of codes, scales and x and one write of y. Cases of the
other products with quantized weights (int8 activations, gradients) are in the same family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import optional
from flcore.bench.qmatmul_dx import CASES as DX_CASES
from flcore.bench.qmatmul_gpu import CASES as GPU_CASES
from flcore.bench.qmatmul_int8 import CASES as INT8_CASES
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_int4", "build_nf4", "build_scheme"]

ROUNDING = {"float32": 2.0**-22, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # of the result
SCALES = (0.5, 0.625, 0.75, 1.0, 1.25)  # exact in bfloat16: peers get the same weight


class _Inputs:
    """x, weights of random codes, and the same weights for peers."""

    def __init__(self, setup: Setup, m: int, n: int, k: int, scheme: str, dtype: str) -> None:
        from flcore.quantization import QuantizedTensor, Scheme

        torch: Any = optional("torch")[0]
        self.torch = torch
        self.setup, self.dtype = setup, dtype
        found = Scheme.of(scheme, scale_dtype="float32") if scheme == "nf4" else Scheme.of(scheme)
        rng = setup.rng()
        group = found.group_size(k)
        groups = -(-k // group) if group < k else 1
        blocks, chunks = -(-n // 16), -(-k // 32)
        self.weights: list[Any] = []
        for _ in range(setup.cold_slots(n * k * found.bits // 8)):
            codes = rng.integers(0, 256, (blocks, chunks, 64 * found.bits), dtype=np.uint8)
            if found.kind == "fp8":
                codes &= 0xB7  # no infinities and nothing large
            scales = rng.choice(SCALES, (blocks, groups, 16)).astype(found.scale_dtype) / 64
            zeros = None
            if found.kind == "integer_zero":
                zeros = rng.integers(0, 2**found.bits, scales.shape, dtype=np.uint8)
            made = QuantizedTensor.from_parts((n, k), found, codes, scales, zeros, layout="tile16")
            self.weights.append(made.torch())
        draw = torch.Generator().manual_seed(setup.seed)
        self.x = torch.randn((m, k), generator=draw).to(getattr(torch, dtype))
        item = self.x.element_size()
        self.bytes_moved = self.weights[0].nbytes + item * m * (n + k)

    def copies(self, nbytes: int) -> int:
        """How many weights of `nbytes` a peer rotates over."""
        return min(len(self.weights), self.setup.cold_slots(nbytes))

    def linear(self, dtype: str) -> Callable[[int], Any]:
        """Return the product with whole weights of `dtype`."""
        torch, kind = self.torch, getattr(self.torch, dtype)
        n, k = self.weights[0].shape
        count = self.copies(n * k * (4 if dtype == "float32" else 2))
        wholes = [w.dequantize(kind) for w in self.weights[:count]]
        x = self.x.to(kind)
        return lambda slot: torch.nn.functional.linear(x, wholes[slot % count])

    def int4pack(self) -> Callable[[int], Any]:
        """Return torch's product with 4-bit weights, which takes bfloat16."""
        torch, aten = self.torch, self.torch.ops.aten
        from flcore.reference.weight_quant import unpack_tile16, untile_groups

        n, k = self.weights[0].shape
        group, packed = self.weights[0].group, []
        for w in self.weights:
            codes = unpack_tile16(w.codes.numpy(), n, k, 4).astype(np.int32)
            scales = torch.from_numpy(untile_groups(w.scales.numpy(), n)).T
            pairs = torch.stack([scales, torch.zeros_like(scales)], -1).to(torch.bfloat16)
            product = aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(codes), 1)
            packed.append((product, pairs.contiguous()))
        x = self.x.to(torch.bfloat16)
        multiply = aten._weight_int4pack_mm_for_cpu
        return lambda slot: multiply(x, packed[slot][0], group, packed[slot][1])

    def check(self, dtype: str, inexact: float = 0.0) -> Callable[[int, np.ndarray], str | None]:
        """Return the check of results of which `dtype` is the narrowest type on the way.

        `inexact`: what every term may be off, as a part of it.
        """

        def matches(slot: int, result: np.ndarray) -> str | None:
            w, x = self.weights[slot].dequantize("float64"), self.x.double()
            want = (x @ w.T).numpy()
            length = (x.norm(dim=1)[:, None] * w.norm(dim=1)).numpy()
            part = inexact + (2.0**-20 if dtype == "float32" == self.dtype else 2.0**-9)
            allowed = ROUNDING[dtype] * np.abs(want) + part * length
            return difference(result.reshape(-1), want.reshape(-1), allowed.reshape(-1))

        return matches

    def ours(self) -> Contestant:
        from flcore.ops import qmatmul

        return Contestant(
            "flcore qmatmul", lambda slot: qmatmul(self.x, self.weights[slot]), _numpy, kind="ours"
        )

    def workload(self, contestants: list[Contestant], absent: dict[str, str]) -> Workload:
        return Workload(
            [self.ours(), *contestants],
            self.check(self.dtype),
            self.bytes_moved,
            absent,
            slots=len(self.weights),
        )


def _numpy(result: Any) -> np.ndarray:
    return np.asarray(result.double().numpy())


def build_int4(setup: Setup, *, m: int, n: int, k: int, dtype: str) -> Workload:
    """Four bits in groups of 128, symmetric."""
    inputs = _Inputs(setup, m, n, k, "int4", dtype)
    peers = [
        Contestant(
            f"torch F.linear {dtype}", inputs.linear(dtype), _numpy, matches=inputs.check(dtype)
        )
    ]
    absent = {}
    name = "torch _weight_int4pack_mm_for_cpu (bfloat16)"
    if hasattr(inputs.torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        check = inputs.check("bfloat16", 2.0**-9)
        peers.append(Contestant(name, inputs.int4pack(), _numpy, matches=check))
    else:
        absent[name] = "this torch has no such operator"
    return inputs.workload(peers, absent)


def build_nf4(setup: Setup, *, m: int, n: int, k: int, dtype: str) -> Workload:
    """NF4 in blocks of 64."""
    inputs = _Inputs(setup, m, n, k, "nf4", dtype)
    torch = inputs.torch
    name = "bitsandbytes Linear4bit"
    peers, absent = [], {}
    bnb, why = optional("bitsandbytes")
    if bnb is None:
        absent[name] = why
    else:
        check = inputs.check(dtype, 2.0**-5)  # a block without the code of 1 gets another scale
        wants_grad = inputs.x.clone().requires_grad_()  # then W is dequantised for the product

        def layers(training: bool) -> Callable[[int], Any]:
            made = []
            for w in inputs.weights:
                layer = bnb.nn.Linear4bit(
                    k, n, bias=False, compute_dtype=inputs.x.dtype, quant_type="nf4"
                )
                layer.weight = bnb.nn.Params4bit(
                    w.dequantize("float32"), requires_grad=False, quant_type="nf4", blocksize=64
                )
                made.append(layer.to("cpu").train(training))
            x = wants_grad if training else inputs.x

            def linear(slot: int) -> Any:
                with torch.set_grad_enabled(training):
                    return made[slot](x).detach()

            for slot in range(len(made)):
                linear(slot)  # the first call packs
            return linear

        peers.append(Contestant(name, layers(False), _numpy, matches=check))
        peers.append(Contestant(f"{name}, in training", layers(True), _numpy, matches=check))
    dense = Contestant(
        f"torch F.linear {dtype}",
        inputs.linear(dtype),
        _numpy,
        matches=inputs.check(dtype, 2.0**-9),
    )
    return inputs.workload([*peers, dense], absent)


def build_scheme(setup: Setup, *, m: int, n: int, k: int, dtype: str, scheme: str) -> Workload:
    """Any scheme, beside whole weights in torch."""
    inputs = _Inputs(setup, m, n, k, scheme, dtype)
    check = inputs.check(dtype, 2.0**-9)
    dense = Contestant(f"torch F.linear {dtype}", inputs.linear(dtype), _numpy, matches=check)
    return inputs.workload([dense], {})


def _case(scheme: str, m: int, n: int, dtype: str) -> Case:
    build: Any = {"int4": build_int4, "nf4": build_nf4}.get(scheme, build_scheme)
    extra = {} if scheme in ("int4", "nf4") else {"scheme": scheme}
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    return Case(
        name=f"{scheme.replace('-', '_')}_{n}x4096_m{m}_{short}",
        family="qmatmul",
        title=f"y = x W^T, {m} row{'s' * (m > 1)}, W {n} x 4096 {scheme}, {dtype}",
        formula="n·k·bits/8 + scales + x + y",
        build=build,
        sizes={"m": m, "n": n, "k": 4096, "dtype": dtype, **extra},
        tiny={"m": min(m, 9), "n": 32, "k": 256, "dtype": dtype, **extra},
        dtype=dtype,
        needs=("torch",),
    )


CASES = [
    *(_case("int4", 1, n, dtype) for n in (4096, 11008) for dtype in ("float32", "bfloat16")),
    *(_case("int4", m, n, "bfloat16") for n in (4096, 11008) for m in (64, 256)),
    *(_case("int4", m, 4096, "float32") for m in (4, 64)),
    *(_case("nf4", m, 4096, "bfloat16") for m in (1, 8, 32)),
    *(_case(scheme, 1, 4096, "float32") for scheme in ("int2", "int3", "int8", "fp8")),
    *INT8_CASES,
    *DX_CASES,
    *GPU_CASES,
]
