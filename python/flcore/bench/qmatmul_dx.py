"""Gradients through packed weights beside writing the whole matrix back and multiplying by it."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_dx"]

# What is right: of the result, and of the length of the sum's terms, for us and for peers, who
# round the weight to the dtype.
ROUNDING = {"float32": (2.0**-23, 2.0**-20, 2.0**-20), "bfloat16": (2.0**-8, 2.0**-11, 2.0**-7)}


class _Inputs:
    """Weights of random codes, and one dY."""

    def __init__(
        self, torch: Any, setup: Setup, m: int, n: int, k: int, scheme: str, dtype: str
    ) -> None:
        from flcore.quantization import QuantizedTensor, Scheme

        self.torch = torch
        self.kind = getattr(self.torch, dtype)
        found = Scheme.of(scheme)
        self.group = found.group
        generator = self.torch.Generator().manual_seed(setup.seed)
        self.slots = setup.cold_slots(n * k * found.bits // 8)
        scale_dtype = getattr(self.torch, found.scale_dtype)
        self.weights = []
        for _ in range(self.slots):
            codes = self.torch.randint(
                0, 256, (n // 16, k // 32, 64 * found.bits), dtype=self.torch.uint8,
                generator=generator,
            )  # fmt: skip
            scales = self.torch.rand(n // 16, k // self.group, 16, generator=generator) + 0.5
            self.weights.append(
                QuantizedTensor.from_parts(
                    (n, k), found, codes, scales.to(scale_dtype), layout="tile16"
                )
            )
        self.rows = [w.to_layout("rows") for w in self.weights]
        self.dy = self.torch.randn(m, n, generator=generator).to(self.kind)
        self.table = None if found.table is None else self.torch.from_numpy(found.table)

    def eager_weight(self, slot: int) -> Any:
        """Unpack, subtract or look up, and scale in the dtype of dY, as people write it."""
        codes, scales = self.rows[slot].codes, self.rows[slot].scales
        q = self.torch.stack([codes & 15, codes >> 4], -1).view(codes.shape[0], -1, self.group)
        level = q.to(self.kind) - 8 if self.table is None else self.table.to(self.kind)[q.int()]
        return (level * scales.to(self.kind).unsqueeze(-1)).view(codes.shape[0], -1)

    def check(self, factor: int, dtype: str) -> Any:
        of_result, *of_terms = ROUNDING[dtype]

        def matches(slot: int, result: np.ndarray) -> str | None:
            w, dy = self.weights[slot].dequantize("float64"), self.dy.double()
            want = (dy @ w).numpy()
            length = (dy.norm(dim=1)[:, None] * w.norm(dim=0)).numpy()
            allowed = of_result * np.abs(want) + of_terms[factor] * length
            return difference(result.reshape(-1), want.reshape(-1), allowed.reshape(-1))

        return matches


def _numpy(result: Any) -> np.ndarray:
    return result.double().numpy()


def build_dx(setup: Setup, *, m: int, n: int, k: int, dtype: str, scheme: str = "int4") -> Workload:
    """``dX = dY W`` for m rows."""
    from flcore.ops import qmatmul_dx

    inputs = _Inputs(optional("torch")[0], setup, m, n, k, scheme, dtype)
    peer = inputs.check(1, dtype)
    buffer = inputs.torch.empty(n, k, dtype=inputs.kind)  # fresh memory would cost more than it

    def whole(slot: int) -> Any:
        return inputs.dy @ inputs.weights[slot].dequantize(dtype, out=buffer)

    def eager(slot: int) -> Any:
        return inputs.dy @ inputs.eager_weight(slot)

    return Workload(
        contestants=[
            Contestant(
                "flcore qmatmul_dx",
                lambda slot: qmatmul_dx(inputs.dy, inputs.weights[slot]),
                _numpy,
                kind="ours",
            ),
            Contestant("flcore dequantize, torch matmul", whole, _numpy, matches=peer),
            Contestant("torch dequantize, torch matmul", eager, _numpy, matches=peer),
        ],
        matches=inputs.check(0, dtype),
        bytes_moved=inputs.weights[0].nbytes + inputs.dy.element_size() * m * (n + k),
        slots=inputs.slots,
    )


def _case(m: int, n: int, dtype: str, scheme: str = "int4") -> Case:
    short = "" if dtype == "float32" else "_bf16"
    group = {"int4": 128, "nf4": 64}[scheme]
    return Case(
        name=f"dx_{scheme}_{n}x4096_m{m}{short}",
        family="qmatmul",
        title=f"dX = dY W, {m} rows, W {n} x 4096 {scheme}, {dtype}",
        formula="n·k/2 + scales + dY + dX",
        build=build_dx,
        sizes={"m": m, "n": n, "k": 4096, "dtype": dtype, "scheme": scheme},
        tiny={"m": min(m, 5), "n": 32, "k": 2 * group, "dtype": dtype, "scheme": scheme},
        dtype=dtype,
        needs=("torch",),
        note="Peers write W (n·k values of the dtype) and read it again.",
    )


CASES = [
    *(_case(m, 4096, dtype) for m in (1, 8, 16, 256) for dtype in ("float32", "bfloat16")),
    *(_case(m, 11008, dtype) for m in (16, 256) for dtype in ("float32", "bfloat16")),
    *(_case(m, 4096, "bfloat16", "nf4") for m in (16, 256)),
]
