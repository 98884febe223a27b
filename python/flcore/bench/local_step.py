"""Local steps, ends of rounds and the linear server step beside the torch code that people run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload
from flcore.bench.environment import optional
from flcore.bench.local_round import Call, build_linear, build_round_end, checked, flat
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_rows", "build_step"]

# Of FedDyn and FedSpeed: 1 / lambda, the clip and the weight decay of the FL-Simulator code base
LAM, CLIP, DECAY, LR = 0.1, 10.0, 1e-3, 1e-2


def _stepped(x: np.ndarray, g: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Give the step's result in float64; rows where there are two dimensions."""
    v = g.astype(np.float64) + q
    norm = np.sqrt((v * v).sum(axis=-1, keepdims=True))
    return x - LR * (np.minimum(1.0, CLIP / norm) * v + (DECAY + LAM) * x)


# ---- one model: a step of FedDyn or FedSpeed ---------------------------------------------------


def _penalty_chain(torch: Any, slot: dict[str, Any]) -> None:
    """Take the step as the FL-Simulator code base does; the loss's gradients are there already.

    The penalty's gradients are added to them by autograd, as those of ``loss + penalty`` are.
    """
    params = slot["params"]
    vector = torch.nn.utils.parameters_to_vector(params)
    (LAM * torch.sum(vector * slot["correction"])).backward()
    torch.nn.utils.clip_grad_norm_(params, CLIP)
    slot["optimizer"].step()


def _grown_chain(torch: Any, slot: dict[str, Any]) -> None:
    """Take the step as the code published with FedDyn does: a vector that grows by each tensor."""
    vector: Any = None
    for p in slot["params"]:
        vector = p.reshape(-1) if vector is None else torch.cat((vector, p.reshape(-1)), 0)
    (LAM * torch.sum(vector * (-slot["start"] + slot["dual"]))).backward()
    torch.nn.utils.clip_grad_norm_(slot["params"], CLIP)
    slot["optimizer"].step()


def _closed_chain(torch: Any, x: list[Any], g: list[Any], q: list[Any]) -> None:
    """Take the step in its closed form, with torch's multi-tensor functions."""
    v = torch._foreach_add(g, q)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(v)))
    torch._foreach_mul_(v, torch.clamp(CLIP / norm, max=1.0))
    torch._foreach_add_(v, x, alpha=DECAY + LAM)
    torch._foreach_add_(x, v, alpha=-LR)


def _written_out(torch: Any, x: list[Any], g: list[Any], q: list[Any]) -> None:
    """Take the step in its closed form, for a compiler to fuse."""
    squares = sum(((a + b) * (a + b)).sum() for a, b in zip(g, q, strict=True))
    scale = torch.clamp(CLIP * torch.rsqrt(squares), max=1.0)
    for one, a, b in zip(x, g, q, strict=True):
        one.sub_(LR * (scale * (a + b) + (DECAY + LAM) * one))


class _Models:
    """What all contestants start from, `[slot][tensor]`."""

    def __init__(self, torch: Any, setup: Setup, tensors: int, numel: int) -> None:
        self._torch = torch
        generator = torch.Generator().manual_seed(setup.seed)
        self.slots = setup.cold_slots(12 * tensors * numel)
        drawn = torch.randn(3, self.slots, tensors, numel, generator=generator)
        self.x, self.g, self.q = drawn.to(setup.device)

    def copies(self, grown: bool) -> list[dict[str, Any]]:
        """Make parameters with gradients, an optimiser and the penalty's vectors, for each slot."""
        found = []
        for x, g, q in zip(self.x, self.g, self.q, strict=True):
            params = [self._torch.nn.Parameter(v.clone()) for v in x]
            for p, grad in zip(params, g, strict=True):
                p.grad = grad.clone()
            optimizer = self._torch.optim.SGD(params, lr=LR, weight_decay=DECAY + LAM)
            found.append({"params": params, "optimizer": optimizer})
            if grown:
                found[-1] |= {"start": x.reshape(-1), "dual": (q / LAM + x).reshape(-1)}
            else:
                found[-1] |= {"correction": (q / LAM).reshape(-1)}
        return found

    def reset(self, made: list[dict[str, Any]]) -> None:
        """Put parameters and gradients back."""
        with self._torch.no_grad():
            for slot, x, g in zip(made, self.x, self.g, strict=True):
                for p, value, grad in zip(slot["params"], x, g, strict=True):
                    p.copy_(value)
                    p.grad.copy_(grad)

    def expected(self) -> list[np.ndarray]:
        arrays = [[flat(slot) for slot in tensors] for tensors in (self.x, self.g, self.q)]
        return [_stepped(x, g, q) for x, g, q in zip(*arrays, strict=True)]


def build_step(setup: Setup, *, tensors: int, numel: int) -> Workload:
    """A step of FedDyn or FedSpeed on a model of some tensors, gradients given."""
    from flcore.optim import local_step_

    torch: Any = optional("torch")[0]
    models = _Models(torch, setup, tensors, numel)

    def contestant(
        name: str, step: Callable[..., None], grown: bool = False, **more: Any
    ) -> Contestant:
        made = models.copies(grown)
        q = [list(v) for v in models.q]

        def call(slot: int) -> Any:
            step(made[slot], q[slot])
            return made[slot]["params"]

        return Contestant(name, call, flat, lambda: models.reset(made), **more)

    def closed(function: Callable[..., None]) -> Callable[..., None]:
        def step(slot: dict[str, Any], q: list[Any]) -> None:
            params = slot["params"]
            function([p.data for p in params], [p.grad for p in params], q)

        return step

    def ours(slot: dict[str, Any], q: list[Any]) -> None:
        local_step_(slot["params"], q, lr=LR, decay=DECAY + LAM, clip=CLIP)

    contestants = [
        contestant("flcore local_step_", ours, kind="ours"),
        contestant(_PENALTY, lambda slot, q: _penalty_chain(torch, slot)),
        contestant(_GROWN, lambda slot, q: _grown_chain(torch, slot), grown=True),
        contestant(_CLOSED, closed(lambda *a: _closed_chain(torch, *a))),
    ]
    absent = {}
    if setup.compiled:
        penalty = torch.compile(lambda slot: _penalty_chain(torch, slot))
        contestants.append(contestant(_PENALTY_COMPILED, lambda slot, q: penalty(slot)))
        fused = torch.compile(lambda *a: _written_out(torch, *a))
        contestants.append(contestant(_CLOSED_COMPILED, closed(fused)))
    else:
        absent = dict.fromkeys((_PENALTY_COMPILED, _CLOSED_COMPILED), "left out on request")
    return Workload(
        contestants=contestants,
        matches=checked(models.expected()),
        bytes_moved=24 * tensors * numel,
        absent=absent,
        slots=models.slots,
    )


_PENALTY = "torch eager chain: penalty by autograd, clip_grad_norm_, SGD"
_PENALTY_COMPILED = "torch.compile of that chain"
_GROWN = "torch eager chain, the vector grown tensor by tensor"
_CLOSED = "torch _foreach chain of the closed form"
_CLOSED_COMPILED = "torch.compile of the closed form"


# ---- rows: small models --------------------------------------------------------------------------


def _rows_chain(torch: Any, x: Any, g: Any, q: Any) -> None:
    v = g + q
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    v *= torch.clamp(CLIP / norm, max=1.0)
    v.add_(x, alpha=DECAY + LAM)
    x.sub_(v, alpha=LR)


def build_rows(setup: Setup, *, rows: int, numel: int) -> Workload:
    """The same step for many small models at once, each with a norm of its own."""
    from flcore.ops import LocalStep

    torch: Any = optional("torch")[0]
    generator = torch.Generator().manual_seed(setup.seed)
    start, g, q = torch.randn(3, rows, numel, generator=generator).to(setup.device)

    def contestant(name: str, prepare: Callable[[Any], Call], **more: Any) -> Contestant:
        x = start.clone()
        step = prepare(x)

        def call(slot: int) -> Any:
            step(slot)
            return x

        return Contestant(name, call, flat, lambda: x.copy_(start), **more)

    def ours(x: Any) -> Call:
        steps = LocalStep(x, g, q)
        return lambda slot: steps.step(LR, decay=DECAY + LAM, clip=CLIP)

    def matrix(x: Any) -> Call:
        return lambda slot: _rows_chain(torch, x, g, q)

    def looped(x: Any) -> Call:
        models = list(zip(x.unbind(), g.unbind(), q.unbind(), strict=True))

        def step(slot: int) -> None:
            for one, grad, more in models:
                _closed_chain(torch, [one], [grad], [more])

        return step

    contestants = [
        contestant("flcore LocalStep.step", ours, kind="ours"),
        contestant(
            "torch eager chain on the matrix", lambda x: lambda _: _rows_chain(torch, x, g, q)
        ),
        contestant("torch eager chain, model by model", looped),
    ]
    absent = {}
    if setup.compiled:
        fused = torch.compile(lambda x: _rows_chain(torch, x, g, q))
        contestants.append(contestant("torch.compile of the chain", lambda x: lambda _: fused(x)))
    else:
        absent["torch.compile of the chain"] = "left out on request"
    want = _stepped(*(v.double().cpu().numpy() for v in (start, g, q))).ravel()
    return Workload(
        contestants=contestants,
        matches=checked([want]),
        bytes_moved=16 * rows * numel,
        absent=absent,
    )


def _case(name: str, title: str, formula: str, build: Any, **more: Any) -> Case:
    return Case(
        name=name,
        family="local_step",
        title=title,
        formula=formula,
        build=build,
        dtype="float32",
        bound=more.pop("bound", "copy"),
        devices=("cpu", "cuda"),
        needs=("torch",),
        **more,
    )


CASES = [
    _case(
        "local_step_10x1m",
        "a local step of FedDyn or FedSpeed with clipping, 10 x 1,000,000",
        "24·d: g and q read for the norm; x, g and q read and x written",
        build_step,
        sizes={"tensors": 10, "numel": 1_000_000},
        tiny={"tensors": 3, "numel": 1009},
        note="Gradients of the loss are given. The last values of g and q come from cache.",
    ),
    _case(
        "local_step_rows_100x4810",
        "the same step for 100 models of 4,810 parameters, in cache",
        "16·d: x, g and q read and x written; the norm's read is from the first cache",
        build_rows,
        sizes={"rows": 100, "numel": 4810},
        tiny={"rows": 3, "numel": 101},
        hot=True,
    ),
    _case(
        "round_end_10m",
        "update and control variate of a SCAFFOLD client, 10,000,000",
        "24·d: x, w, c and c_i read, u and c_i written",
        build_round_end,
        sizes={"numel": 10_000_000},
        tiny={"numel": 1009},
    ),
    _case(
        "server_linear_8x5m",
        "mean update and the server step of FedDyn, 8 clients x 5,000,000",
        "(4·n + 16)·d: updates read once; model and state read and written once",
        build_linear,
        sizes={"clients": 8, "numel": 5_000_000},
        tiny={"clients": 3, "numel": 1009},
        bound="read",
        note="flcore also looks for values that are not finite.",
    ),
]
