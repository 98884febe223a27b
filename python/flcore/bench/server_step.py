"""Case of the server family: the weighted mean of client updates and one step of FedAdam along it.

The peers update model and state in place, as an eager training loop does, and all but one get the
stacked matrix free of charge, where frameworks hold a list. flcore writes the new model and state
beside the old ones, so that a bad update leaves both as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import BLAS_SPIN_S, optional
from flcore.bench.timers import Contestant
from flcore.bench.updates import Updates, make_updates, to_numpy

__all__ = ["CASES", "build_adam"]

LR, BETA1, BETA2, TAU = 0.1, 0.9, 0.99, 1e-3  # FedAdam's defaults; v starts at TAU^2
ROUNDS = 2  # that are verified: the second depends on the state of the first


class _Expected:
    """Models after each verified round in float64, and how far float32 may be from them."""

    def __init__(self, data: Updates, start: np.ndarray) -> None:
        from flcore.ops import Step
        from flcore.reference.step import advance

        step = Step("adam", lr=LR, beta1=BETA1, beta2=BETA2, tau=TAU)
        w, m, v = start.astype(np.float64), np.zeros(len(start)), np.full(len(start), TAU**2)
        self.models, self.allowed = [], []
        allowed = np.abs(w) * 2.0**-22
        for turn in range(ROUNDS):
            d, size = np.zeros(len(start)), np.zeros(len(start))
            for p, row in zip(data.portions, data.stacked[turn], strict=True):
                term = float(p) * to_numpy(row)
                d, size = d + term, size + np.abs(term)
            w, m, v = advance(step, d, w, m, v)
            error = (len(data.portions) + 16) * 2.0**-24 * size  # of D, in any order of summation
            # the quotient answers to D through m, and through v by no more than the same again
            allowed = allowed + 2 * LR * error / (np.sqrt(v) + TAU) + np.abs(w) * 2.0**-22
            self.models.append(w)
            self.allowed.append(allowed)

    def matches(self, turn: int, result: np.ndarray) -> str | None:
        return difference(result, self.models[turn], self.allowed[turn])


def _ours(data: Updates, start: Any, likes: list[Any]) -> list[Contestant]:
    from flcore.aggregation import FedAdam

    updates, weights = data.updates(), data.weights.tolist()

    def contestant(name: str, kind: str, buffers: list[Any] | None) -> Contestant:
        server = FedAdam(lr=LR, betas=(BETA1, BETA2), tau=TAU)
        held = {"model": start}

        def call(slot: int) -> Any:
            out = None if buffers is None else buffers[server.round % 2]
            held["model"] = server.step(held["model"], updates[slot], weights, out=out)
            return held["model"]

        def reset() -> None:
            server.reset()
            held["model"] = start

        return Contestant(name, call, to_numpy, reset, kind=kind)

    return [
        contestant("flcore FedAdam.step", "ours", None),
        contestant("flcore FedAdam.step, out=", "variant", likes),
    ]


def _numpy_chain(data: Updates, start: np.ndarray) -> Contestant:
    w, m, v = start.copy(), np.zeros_like(start), np.empty_like(start)
    weights = data.portions

    def reset() -> None:
        w[:], m[:], v[:] = start, 0, TAU**2

    def call(slot: int) -> np.ndarray:
        nonlocal m, v
        d = weights @ data.stacked[slot]
        m = np.float32(BETA1) * m + np.float32(1 - BETA1) * d
        v = np.float32(BETA2) * v + np.float32(1 - BETA2) * d**2
        w[:] += np.float32(LR) * m / (np.sqrt(v) + np.float32(TAU))
        return w

    reset()
    return Contestant("numpy chain", call, to_numpy, reset, rest_s=BLAS_SPIN_S)


def _torch_chains(torch: Any, data: Updates, start: Any, setup: Setup) -> list[Contestant]:
    """Eager operations in place, and two forms for the compiler to fuse."""
    as_torch = lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x  # noqa: E731
    stacked = [as_torch(matrix) for matrix in data.stacked]
    rows = [list(matrix.unbind()) for matrix in stacked]
    first = as_torch(start)
    weights = torch.from_numpy(data.portions).to(first.device)

    def eager(xs: Any, p: Any, w: Any, m: Any, v: Any) -> None:
        d = p @ xs
        m.mul_(BETA1).add_(d, alpha=1 - BETA1)
        v.mul_(BETA2).addcmul_(d, d, value=1 - BETA2)
        w.addcdiv_(m, v.sqrt().add_(TAU), value=LR)

    def written_out(xs: Any, p: Any, w: Any, m: Any, v: Any) -> None:
        d = xs[0] * p[0]
        for i in range(1, len(xs)):
            d = d + xs[i] * p[i]
        m.copy_(BETA1 * m + (1 - BETA1) * d)
        v.copy_(BETA2 * v + (1 - BETA2) * d * d)
        w.add_(LR * m / (v.sqrt() + TAU))

    def contestant(name: str, step: Callable[..., None], inputs: list[Any]) -> Contestant:
        w, m, v = (torch.empty_like(first) for _ in range(3))

        def reset() -> None:
            w.copy_(first)
            m.zero_()
            v.fill_(TAU**2)

        def call(slot: int) -> Any:
            step(inputs[slot], weights, w, m, v)
            return w

        reset()
        return Contestant(name, call, to_numpy, reset)

    found = [contestant(_EAGER, eager, stacked), contestant(_LIST, written_out, rows)]
    if setup.compiled:
        found.append(contestant(_COMPILED, torch.compile(eager), stacked))
        found.append(contestant(_FUSED, torch.compile(written_out), rows))
    return found


_EAGER = "torch eager chain, weights @ stacked"
_LIST = "torch eager chain, sum of w * x over the list of updates"
_COMPILED = "torch.compile of the chain"
_FUSED = "torch.compile of sum(w * x) and the chain"


def build_adam(setup: Setup, *, clients: int, numel: int) -> Workload:
    """FedAdam along the mean of resident float32 updates."""
    data = make_updates(setup, clients, numel, "float32")
    data.stacked *= -(-ROUNDS // len(data.stacked))  # a large set may come alone
    torch: Any
    torch, reason = optional("torch")
    start: Any = np.random.default_rng(setup.seed + 1).standard_normal(numel, dtype=np.float32)
    expected = _Expected(data, start)
    if setup.device == "cuda":
        start = torch.from_numpy(start).cuda()
    contestants = _ours(data, start, [start * 0 for _ in range(2)])
    absent: dict[str, str] = {}
    if setup.device == "cpu":
        contestants.append(_numpy_chain(data, start))
    else:
        absent["numpy chain"] = "no CUDA arrays in NumPy"
    if torch is None:
        absent |= dict.fromkeys((_EAGER, _LIST, _COMPILED, _FUSED), reason)
    else:
        contestants += _torch_chains(torch, data, start, setup)
        if not setup.compiled:
            absent |= dict.fromkeys((_COMPILED, _FUSED), "left out on request")
    return Workload(
        contestants=contestants,
        matches=expected.matches,
        bytes_moved=(4 * clients + 24) * numel,
        absent=absent,
        slots=len(data.stacked),
        verify_slots=range(ROUNDS),
    )


CASES = [
    Case(
        name="fedadam_32x1m",
        family="server",
        title="weighted mean and a step of FedAdam, 32 clients x 1,000,000",
        formula="(4·n + 24)·d: updates read once; model, m and v read and written once",
        build=build_adam,
        sizes={"clients": 32, "numel": 1_000_000},
        tiny={"clients": 4, "numel": 4099},
        devices=("cpu", "cuda"),
        note="The peers overwrite model and state, whatever comes in; flcore writes new ones and "
        "looks for values that are not finite. Model and state (24 MB) may stay in cache.",
    ),
]
