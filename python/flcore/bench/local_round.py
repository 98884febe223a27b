"""Ends of rounds and the linear server step, for the cases of `flcore.bench.local_step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flcore.bench.cases import Setup, Workload, difference
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["Call", "build_linear", "build_round_end", "checked", "flat"]

LOCAL_LR = 1e-2
ROUNDING = 2e-6  # of values around 1 after some operations in float32

Call = Callable[[int], Any]


def flat(tensors: Any) -> np.ndarray:
    """Give the values of one or more tensors in float64."""
    parts = tensors if isinstance(tensors, list | tuple) else [tensors]
    return np.concatenate([t.detach().double().cpu().numpy().ravel() for t in parts])


def checked(expected: Sequence[np.ndarray]) -> Callable[[int, np.ndarray], str | None]:
    """Give the check of a workload against what each slot should give, float64."""

    def matches(slot: int, result: np.ndarray) -> str | None:
        want = expected[slot]
        return difference(result, want, ROUNDING * (1 + np.abs(want)))

    return matches


def build_round_end(setup: Setup, *, numel: int) -> Workload:
    """Update and control variate of a SCAFFOLD client."""
    from flcore.ops import round_end

    torch: Any = optional("torch")[0]
    generator = torch.Generator().manual_seed(setup.seed)
    slots = setup.cold_slots(24 * numel)
    drawn = torch.randn(4, slots, numel, generator=generator).to(setup.device)
    x, w, c, start = drawn
    scale = 1 / (50 * LOCAL_LR)

    def eager(x: Any, w: Any, c: Any, own: Any, u: Any) -> Any:
        torch.sub(x, w, out=u)
        own.copy_(own - c - scale * u)
        return u

    def contestant(name: str, step: Callable[..., Any], **more: Any) -> Contestant:
        own, u = start.clone(), torch.empty_like(x)

        def call(slot: int) -> Any:
            step(x[slot], w[slot], c[slot], own[slot], u[slot])
            return own[slot], u[slot]

        return Contestant(name, call, flat, lambda: own.copy_(start), **more)

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
        a, b, d, h = (flat(v[slot]) for v in (x, w, c, start))
        expected.append(np.concatenate([h - d - scale * (a - b), a - b]))
    return Workload(
        contestants=contestants,
        matches=checked(expected),
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
        return Contestant(name, call, flat, **more)

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
        state = flat(dual) + share * d
        expected.append(np.concatenate([flat(model) + d + state, state]))
    return Workload(
        contestants=contestants,
        matches=checked(expected),
        bytes_moved=(4 * clients + 16) * numel,
        absent=absent,
        slots=slots,
    )
