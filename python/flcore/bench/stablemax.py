"""StableMax along a dimension, its gradient, and the collapse of logits, beside torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_collapse", "build_stablemax"]

CHECKED = 16  # rows


def _eager(torch: Any, x: Any, dim: int, log: bool) -> Any:
    """Return what users run; float32, where its gradient is NaN at logits of exactly 1."""
    s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
    p = s / s.sum(dim, keepdim=True)
    return p.log() if log else p


def _softmax(torch: Any, x: Any, dim: int, log: bool) -> Any:
    return torch.log_softmax(x, dim) if log else torch.softmax(x, dim)


def _picked(x: Any, dim: int) -> np.ndarray:
    """Some rows, for the check."""
    rows = x.movedim(dim, -1).reshape(-1, x.shape[dim])
    step = max(1, len(rows) // CHECKED)
    return np.asarray(rows[::step].double().cpu().numpy()).reshape(-1)


def build_stablemax(setup: Setup, *, shape: tuple[int, ...], dim: int, log: bool) -> Workload:
    """Forward and backward for a given upstream gradient."""
    from flcore import losses

    torch: Any = optional("torch")[0]
    draw = torch.Generator().manual_seed(setup.seed)
    x = torch.randn(shape, generator=draw).mul_(3).to(setup.device).requires_grad_()
    v = torch.randn(shape, generator=draw).to(setup.device)
    ours = losses.log_stablemax if log else losses.stablemax

    def step(function: Callable[..., Any], slot: int) -> tuple[Any, Any]:
        y = function(x)
        return y.detach(), torch.autograd.grad(y, x, v)[0]

    def to_numpy(result: tuple[Any, Any]) -> np.ndarray:
        return np.concatenate([_picked(part, dim) for part in result])

    def expected(function: Callable[..., Any]) -> np.ndarray:
        wide = x.detach().double().requires_grad_()
        y = function(torch, wide, dim, log)
        return to_numpy((y.detach(), torch.autograd.grad(y, wide, v.double())[0]))

    def check(want: np.ndarray) -> Callable[[int, np.ndarray], str | None]:
        half = len(want) // 2
        allowed = np.repeat([np.abs(want[:half]).max(), np.abs(want[half:]).max()], half)
        return lambda slot, result: difference(result, want, 2e-5 * allowed)

    eager = partial(_eager, torch, dim=dim, log=log)
    softmax = partial(_softmax, torch, dim=dim, log=log)
    matches = check(expected(_eager))
    contestants = [
        Contestant("flcore", partial(step, partial(ours, dim=dim)), to_numpy, kind="ours"),
        Contestant("torch eager", partial(step, eager), to_numpy, matches=matches),
        Contestant(
            "torch softmax", partial(step, softmax), to_numpy, matches=check(expected(_softmax))
        ),
    ]
    absent = {}
    if setup.compiled:
        compiled = partial(step, torch.compile(eager))
        name = "torch.compile of eager"
        contestants.append(Contestant(name, compiled, to_numpy, matches=matches))
    else:
        absent["torch.compile of eager"] = "left out on request"
    return Workload(contestants, matches, 20 * int(np.prod(shape)), absent)


def build_collapse(setup: Setup, *, rows: int, classes: int) -> Workload:
    """Collapse metrics of (rows, classes) logits."""
    from flcore.losses import softmax_collapse_metrics

    torch: Any = optional("torch")[0]
    draw = torch.Generator().manual_seed(setup.seed)
    x = torch.randn((rows, classes), generator=draw).to(setup.device)
    y = torch.randint(0, classes, (rows,), generator=draw).to(setup.device)
    x[torch.arange(rows), y] += torch.linspace(0, 60, rows).to(setup.device)

    def ours(slot: int) -> Any:
        return softmax_collapse_metrics(x, y)[:2]

    def eager(slot: int) -> Any:
        top = x.amax(1, keepdim=True)
        collapsed = (x - top).exp().sum(1) == 1
        losses = torch.nn.functional.cross_entropy(x, y, reduction="none")
        return collapsed.double().mean(), (losses == 0).double().mean()

    def to_numpy(result: Any) -> np.ndarray:
        return np.array([float(v) for v in result])

    expected = to_numpy(eager(0))

    def matches(slot: int, result: np.ndarray) -> str | None:
        # a float32 sum that rounds term by term crosses the threshold elsewhere
        return difference(result, expected, np.full(2, 0.05))

    contestants = [
        Contestant("flcore", ours, to_numpy, kind="ours"),
        Contestant("torch eager", eager, to_numpy, matches=matches),
    ]
    return Workload(contestants, matches, 4 * rows * classes)


def _case(name: str, title: str, shape: tuple[int, ...], dim: int, log: bool) -> Case:
    return Case(
        name=name,
        family="stablemax",
        title=f"{title}, {' x '.join(f'{n:,}' for n in shape)}, forward and backward",
        formula="20·d: x read and p written; x and v read, the gradient written",
        build=partial(build_stablemax, dim=dim, log=log),
        sizes={"shape": shape},
        tiny={"shape": tuple(min(n, 33) for n in shape)},
        bound="copy",
        devices=("cpu", "cuda"),
        needs=("torch",),
    )


CASES = [
    _case("stablemax_rows", "StableMax of rows", (4096, 4096), 1, False),
    _case("stablemax_columns", "StableMax of columns", (16, 1024, 1024), 1, False),
    _case("log_stablemax_rows", "logarithm of StableMax of rows", (4096, 4096), 1, True),
    Case(
        name="softmax_collapse",
        family="stablemax",
        title="collapse metrics of 4,096 x 32,000 logits",
        formula="4·d: every logit read once",
        build=build_collapse,
        sizes={"rows": 4096, "classes": 32_000},
        tiny={"rows": 64, "classes": 301},
        devices=("cpu", "cuda"),
        needs=("torch",),
        note="flcore finds four metrics, torch two of them.",
    ),
]
