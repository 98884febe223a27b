"""Projected gradients: `flcore.optim.perp_grad_` beside the torch code that people run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_perp_grad"]

# What is right: for results rounded once, and for sums and products in the dtype itself.
ROUNDING = {"float32": (2.0**-23, 2e-5), "bfloat16": (2.0**-8, 0.1)}


def _eager(torch: Any, parameters: list[Any]) -> None:
    """Project tensor by tensor, as the published optimiser does."""
    for p in parameters:
        w, g = p.data.view(-1), p.grad.view(-1)
        across = g - torch.dot(w, g) / (torch.dot(w, w) + 1e-30) * w
        scale = g.norm(2) / (across.norm(2) + 1e-30)
        p.grad.copy_((across * scale).view_as(p.grad))


def _foreach(torch: Any, parameters: list[Any]) -> None:
    """Project with torch's multi-tensor functions."""
    w, g = [p.data for p in parameters], [p.grad for p in parameters]
    length = torch._foreach_norm(g)
    squares = torch._foreach_pow(torch._foreach_norm(w), 2)
    products = [x.sum() for x in torch._foreach_mul(w, g)]
    torch._foreach_sub_(g, torch._foreach_mul(w, torch._foreach_div(products, squares)))
    left = torch._foreach_add(torch._foreach_norm(g), 1e-30)
    torch._foreach_mul_(g, torch._foreach_div(length, left))


class _Inputs:
    """Weights that all contestants share, and what their gradients are at the start."""

    def __init__(self, torch: Any, setup: Setup, tensors: int, numel: int, dtype: str) -> None:
        self._torch = torch
        kind = getattr(torch, dtype)
        generator = torch.Generator().manual_seed(setup.seed)
        self.slots = setup.cold_slots(2 * kind.itemsize * tensors * numel)
        drawn = torch.randn(2, self.slots, tensors, numel, generator=generator)
        self.weights, self.grads = drawn.to(kind).to(setup.device)
        self._expected: dict[int, np.ndarray] = {}

    def parameters(self) -> list[list[Any]]:
        """Parameters with gradients of their own, `[slot][tensor]`."""
        found = [[self._torch.nn.Parameter(w) for w in slot] for slot in self.weights]
        for slot, grads in zip(found, self.grads, strict=True):
            for p, g in zip(slot, grads, strict=True):
                p.grad = g.clone()
        return found

    def reset(self, parameters: list[list[Any]]) -> None:
        """Put gradients back."""
        for slot, grads in zip(parameters, self.grads, strict=True):
            for p, g in zip(slot, grads, strict=True):
                p.grad.copy_(g)

    def expected(self, slot: int) -> np.ndarray:
        """All projected gradients of a slot, in float64."""
        if slot not in self._expected:
            parts = []
            for w, g in zip(self.weights[slot].double(), self.grads[slot].double(), strict=True):
                across = g - (w @ g) / (w @ w) * w
                parts.append((across * (g.norm() / across.norm())).cpu().numpy())
            self._expected[slot] = np.concatenate(parts)
        return self._expected[slot]


def _flat(parameters: list[Any]) -> np.ndarray:
    return np.concatenate([p.grad.double().cpu().numpy() for p in parameters])


def build_perp_grad(setup: Setup, *, tensors: int, numel: int, dtype: str) -> Workload:
    """Project the gradients of some parameters, in place."""
    from flcore.optim import perp_grad_

    torch: Any = optional("torch")[0]
    inputs = _Inputs(torch, setup, tensors, numel, dtype)

    def check(rounding: float) -> Callable[[int, np.ndarray], str | None]:
        def matches(slot: int, result: np.ndarray) -> str | None:
            want = inputs.expected(slot)
            return difference(result, want, rounding * (1 + np.abs(want)))

        return matches

    def contestant(name: str, project: Callable[[list[Any]], None], **more: Any) -> Contestant:
        parameters = inputs.parameters()

        def call(slot: int) -> Any:
            project(parameters[slot])
            return parameters[slot]

        return Contestant(name, call, _flat, lambda: inputs.reset(parameters), **more)

    exact, coarse = ROUNDING[dtype]
    peers: dict[str, Callable[[list[Any]], None]] = {
        "torch eager": lambda p: _eager(torch, p),
        "torch _foreach": lambda p: _foreach(torch, p),
    }
    absent = {}
    if setup.compiled:
        peers["torch.compile of eager"] = torch.compile(lambda p: _eager(torch, p))
    else:
        absent["torch.compile of eager"] = "left out on request"
    ours = contestant("flcore perp_grad_", perp_grad_, kind="ours")
    return Workload(
        contestants=[ours, *(contestant(n, f, matches=check(coarse)) for n, f in peers.items())],
        matches=check(exact),
        bytes_moved=5 * getattr(torch, dtype).itemsize * tensors * numel,
        absent=absent,
        slots=inputs.slots,
    )


def _case(name: str, dtype: str, size: int) -> Case:
    return Case(
        name=name,
        family="optim",
        title=f"gradients without their part along the weights, 10 x 1,000,000, {dtype}",
        formula=f"{5 * size}·d: w and g read twice, g written",
        build=build_perp_grad,
        sizes={"tensors": 10, "numel": 1_000_000, "dtype": dtype},
        tiny={"tensors": 3, "numel": 1009, "dtype": dtype},
        dtype=dtype,
        bound="copy",
        devices=("cpu", "cuda"),
        needs=("torch",),
        note="The second read finds part of w and g in cache.",
    )


CASES = [_case("perp_grad_10x1m", "float32", 4), _case("perp_grad_10x1m_bf16", "bfloat16", 2)]
