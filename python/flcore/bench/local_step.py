"""Local steps, ends of rounds and the linear server step beside the torch code that people run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_linear", "build_round_end", "build_rows", "build_step"]

# Of FedDyn and FedSpeed: 1 / lambda, the clip and the weight decay of the FL-Simulator code base
LAM, CLIP, DECAY, LR = 0.1, 10.0, 1e-3, 1e-2
ROUNDING = 2e-6  # of values around 1 after some operations in float32

Flat = Callable[[Any], np.ndarray]
Call = Callable[[int], Any]


def _flat(tensors: Any) -> np.ndarray:
    parts = tensors if isinstance(tensors, list | tuple) else [tensors]
    return np.concatenate([t.detach().double().cpu().numpy().ravel() for t in parts])


def _checked(expected: Sequence[np.ndarray]) -> Callable[[int, np.ndarray], str | None]:
    def matches(slot: int, result: np.ndarray) -> str | None:
        want = expected[slot]
        return difference(result, want, ROUNDING * (1 + np.abs(want)))

    return matches


def _stepped(x: np.ndarray, g: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Give the step's result in float64; rows where there are two dimensions."""
    v = g.astype(np.float64) + q
    norm = np.sqrt((v * v).sum(axis=-1, keepdims=True))
    return x - LR * (np.minimum(1.0, CLIP / norm) * v + (DECAY + LAM) * x)


# ---- one model: a step of FedDyn or FedSpeed ---------------------------------------------------


def _penalty_chain(torch: Any, slot: dict[str, Any]) -> None:
    """Take the step as the published code does; the loss's gradients are there already.

    The penalty's gradients are added to them by autograd, as those of ``loss + penalty`` are.
    """
    params = slot["params"]
    flat = torch.nn.utils.parameters_to_vector(params)
    (LAM * torch.sum(flat * slot["correction"])).backward()
    torch.nn.utils.clip_grad_norm_(params, CLIP)
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

    def copies(self) -> list[dict[str, Any]]:
        """Make parameters with gradients, an optimiser and the correction, for each slot."""
        found = []
        for x, g, q in zip(self.x, self.g, self.q, strict=True):
            params = [self._torch.nn.Parameter(v.clone()) for v in x]
            for p, grad in zip(params, g, strict=True):
                p.grad = grad.clone()
            optimizer = self._torch.optim.SGD(params, lr=LR, weight_decay=DECAY + LAM)
            correction = (q / LAM).reshape(-1)
            found.append({"params": params, "optimizer": optimizer, "correction": correction})
        return found

    def reset(self, made: list[dict[str, Any]]) -> None:
        """Put parameters and gradients back."""
        with self._torch.no_grad():
            for slot, x, g in zip(made, self.x, self.g, strict=True):
                for p, value, grad in zip(slot["params"], x, g, strict=True):
                    p.copy_(value)
                    p.grad.copy_(grad)

    def expected(self) -> list[np.ndarray]:
        arrays = [[_flat(slot) for slot in tensors] for tensors in (self.x, self.g, self.q)]
        return [_stepped(x, g, q) for x, g, q in zip(*arrays, strict=True)]


def build_step(setup: Setup, *, tensors: int, numel: int) -> Workload:
    """A step of FedDyn or FedSpeed on a model of some tensors, gradients given."""
    from flcore.optim import local_step_

    torch: Any = optional("torch")[0]
    models = _Models(torch, setup, tensors, numel)

    def contestant(name: str, step: Callable[..., None], **more: Any) -> Contestant:
        made = models.copies()
        q = [list(v) for v in models.q]

        def call(slot: int) -> Any:
            step(made[slot], q[slot])
            return made[slot]["params"]

        return Contestant(name, call, _flat, lambda: models.reset(made), **more)

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
        matches=_checked(models.expected()),
        bytes_moved=24 * tensors * numel,
        absent=absent,
        slots=models.slots,
    )


_PENALTY = "torch eager chain: penalty by autograd, clip_grad_norm_, SGD"
_PENALTY_COMPILED = "torch.compile of that chain"
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

        return Contestant(name, call, _flat, lambda: x.copy_(start), **more)

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
        matches=_checked([want]),
        bytes_moved=16 * rows * numel,
        absent=absent,
    )


# ---- the end of a round, and the server ----------------------------------------------------------


def build_round_end(setup: Setup, *, numel: int) -> Workload:
    """Update and control variate of a SCAFFOLD client."""
    from flcore.ops import round_end

    torch: Any = optional("torch")[0]
    generator = torch.Generator().manual_seed(setup.seed)
    slots = setup.cold_slots(24 * numel)
    drawn = torch.randn(4, slots, numel, generator=generator).to(setup.device)
    x, w, c, start = drawn
    scale = 1 / (50 * LR)

    def eager(x: Any, w: Any, c: Any, own: Any, u: Any) -> Any:
        torch.sub(x, w, out=u)
        own.copy_(own - c - scale * u)
        return u

    def contestant(name: str, step: Callable[..., Any], **more: Any) -> Contestant:
        own, u = start.clone(), torch.empty_like(x)

        def call(slot: int) -> Any:
            step(x[slot], w[slot], c[slot], own[slot], u[slot])
            return own[slot], u[slot]

        return Contestant(name, call, _flat, lambda: own.copy_(start), **more)

    def ours(x: Any, w: Any, c: Any, own: Any, u: Any) -> None:
        round_end(x, w, kind="control", state=own, c=c, scale=scale, out=u)

    contestants = [
        contestant("flcore round_end", ours, kind="ours"),
        contestant("torch eager chain", eager),
    ]
    absent = {}
    if setup.compiled:

        def plain(x: Any, w: Any, c: Any, own: Any, u: Any) -> None:
            u.copy_(x - w)
            own.copy_(own - c - scale * (x - w))

        contestants.append(contestant("torch.compile of the chain", torch.compile(plain)))
    else:
        absent["torch.compile of the chain"] = "left out on request"
    expected = []
    for slot in range(slots):
        a, b, d, h = (_flat(v[slot]) for v in (x, w, c, start))
        expected.append(np.concatenate([h - d - scale * (a - b), a - b]))
    return Workload(
        contestants=contestants,
        matches=_checked(expected),
        bytes_moved=24 * numel,
        absent=absent,
        slots=slots,
    )


def build_linear(setup: Setup, *, clients: int, numel: int) -> Workload:
    """FedDyn's server: the mean update, the mean dual variable and the model from both."""
    from flcore.ops import Step, combine_step

    torch: Any = optional("torch")[0]
    generator = torch.Generator().manual_seed(setup.seed)
    slots = setup.cold_slots(4 * clients * numel)
    updates = torch.randn(slots, clients, numel, generator=generator).to(setup.device)
    model, dual = torch.randn(2, numel, generator=generator).to(setup.device)
    share, weights = 0.1, [1 / clients] * clients
    rows = [list(matrix) for matrix in updates]

    def ours() -> Call:
        out, state = torch.empty_like(model), torch.empty_like(dual)
        step = Step.linear(a=1.0, b=share, c=1.0, e=1.0)

        def call(slot: int) -> Any:
            got = combine_step(rows[slot], weights, model, step, m=dual, out=out, m_out=state)
            return got.model, got.m

        return call

    def chain(matrix: Any) -> tuple[Any, Any]:
        d = matrix.mean(0)
        state = dual + share * d
        return model + d + state, state

    def peer(function: Callable[[Any], Any]) -> Call:
        return lambda slot: function(updates[slot])

    def contestant(name: str, call: Call, **more: Any) -> Contestant:
        return Contestant(name, call, _flat, **more)

    contestants = [
        contestant("flcore combine_step, linear", ours(), kind="ours"),
        contestant("torch eager chain", peer(chain)),
    ]
    absent = {}
    if setup.compiled:
        contestants.append(contestant("torch.compile of the chain", peer(torch.compile(chain))))
    else:
        absent["torch.compile of the chain"] = "left out on request"
    expected = []
    for matrix in updates:
        d = matrix.double().mean(0).cpu().numpy()
        state = _flat(dual) + share * d
        expected.append(np.concatenate([_flat(model) + d + state, state]))
    return Workload(
        contestants=contestants,
        matches=_checked(expected),
        bytes_moved=(4 * clients + 16) * numel,
        absent=absent,
        slots=slots,
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
