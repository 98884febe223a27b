"""Cases of the losses: forward and backward together, over one tensor of logits or hidden states.

A call is what a training step does: forget the old gradient, compute the mean loss, run backward.
Allocating the gradient is timed for everyone. The bound is one read of the logits and one write of
their gradient; what a two-pass or float64 chain moves beyond that is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from flcore.bench import losses_peers as peers
from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_cross_entropy", "build_linear"]

CHECKED_ROWS = 16
BYTES = {"float32": 4, "bfloat16": 2}

# largest relative error of the mean loss, largest error of a gradient as a share of the largest
TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3}
CHAIN_TOLERANCE = 1e-3  # of a float32 chain that sums in float32 and subtracts close numbers


def _sample(rows: int) -> np.ndarray:
    return np.unique(np.linspace(0, rows - 1, min(rows, CHECKED_ROWS)).astype(np.int64))


def _expected(x: Any, y: Any, kind: str) -> np.ndarray:
    """Mean loss and the gradients of the sampled rows, in float64."""
    torch: Any = optional("torch")[0]
    rows = len(y)

    def terms(part: Any) -> tuple[Any, Any]:
        """Return e_k and the derivative of its logarithm."""
        if kind == "softmax":
            return torch.exp(part - part.amax(1, keepdim=True)), torch.ones_like(part)
        a = 1 + part.abs()
        return torch.where(part < 0, 1 / a, a), 1 / a

    total = 0.0
    for first in range(0, rows, step := max(1, 2**24 // x.shape[1])):
        e, _ = terms(x[first : first + step].detach().double())
        own = e.gather(1, y[first : first + step, None].long())
        total += float((e.sum(1, keepdim=True) / own).log().sum())
    picked = torch.from_numpy(_sample(rows)).to(x.device)
    e, rho = terms(x[picked].detach().double())
    p = e / e.sum(1, keepdim=True)
    p[torch.arange(len(picked)), y[picked].long()] -= 1
    grad = (p * rho / rows).cpu().numpy().reshape(-1)
    return np.concatenate([[total / rows], grad])


def _check(expected: np.ndarray, tolerance: float) -> Callable[[int, np.ndarray], str | None]:
    allowed = np.full(expected.shape, tolerance * np.abs(expected[1:]).max())
    allowed[0] = tolerance * abs(expected[0])
    return lambda slot, result: difference(result, expected, allowed)


def _to_numpy(result: tuple[Any, Any]) -> np.ndarray:
    loss, grad = result
    picked = grad[_sample(len(grad))].double().cpu().numpy().reshape(-1)
    return np.concatenate([[float(loss)], picked])


def _step(loss: Callable[[Any, Any], Any], x: Any, y: Any, slot: int) -> tuple[Any, Any]:
    x.grad = None
    value = loss(x, y)
    value.backward()
    return value.detach(), x.grad


def _logits(setup: Setup, rows: int, classes: int, dtype: str) -> tuple[Any, Any]:
    """Normal logits, and labels that are int64 as torch wants them."""
    torch: Any = optional("torch")[0]
    draw = torch.Generator().manual_seed(setup.seed)
    x = torch.empty((rows, classes), dtype=getattr(torch, dtype)).normal_(0, 2, generator=draw)
    y = torch.randint(0, classes, (rows,), generator=draw)
    return x.to(setup.device).requires_grad_(), y.to(setup.device)


def build_cross_entropy(
    setup: Setup,
    *,
    rows: int,
    classes: int,
    kind: str,
    dtype: str = "float32",
    chains: bool = True,
    others: bool = True,
) -> Workload:
    """Mean cross-entropy of (rows, classes) logits and its gradient.

    `chains`, `others`: whether the eager StableMax chains, and whether the other peers take part.
    """
    from flcore import losses

    torch: Any = optional("torch")[0]
    x, y = _logits(setup, rows, classes, dtype)
    ours = losses.stablemax_cross_entropy if kind == "stablemax" else losses.cross_entropy
    expected = _expected(x, y, kind)
    contestants = [Contestant("flcore", partial(_step, ours, x, y), _to_numpy, kind="ours")]
    absent: dict[str, str] = {}

    def add(name: str, loss: Any, logits: Any, tolerance: float | None, kind: str = "peer") -> None:
        matches = None if tolerance is None else _check(expected, tolerance)
        if tolerance is None:
            matches = _check(_expected(logits, y, "softmax"), 4e-3)
        call = partial(_step, loss, logits, y)
        contestants.append(Contestant(name, call, _to_numpy, matches=matches, kind=kind))

    def compiled(name: str, loss: Any, tolerance: float) -> None:
        if setup.compiled:
            add(name, torch.compile(loss), x, tolerance)
        else:
            absent[name] = "left out on request"

    if dtype != "float32":
        wide = x.detach().float().requires_grad_()
        add("flcore, float32 logits", ours, wide, 2e-2, "variant")
    if kind == "stablemax":
        in_double, in_float = peers.stablemax_loss("float64"), peers.stablemax_loss("float32")
        if dtype == "float32" and chains:
            add("torch float64 chain", in_double, x, TOLERANCE[dtype])
            add("torch float32 chain", in_float, x, CHAIN_TOLERANCE)
        if dtype == "float32" and others:
            compiled("torch.compile of the float64 chain", in_double, TOLERANCE[dtype])
            compiled("torch.compile of the float32 chain", in_float, CHAIN_TOLERANCE)
        if others:
            add("F.cross_entropy (softmax)", peers.softmax_loss(), x, None)
    else:
        add("F.cross_entropy", peers.softmax_loss(), x, max(CHAIN_TOLERANCE, TOLERANCE[dtype]))
        compiled("torch.compile of F.cross_entropy", peers.softmax_loss(), CHAIN_TOLERANCE)
    return Workload(
        contestants=contestants,
        matches=_check(expected, TOLERANCE[dtype]),
        bytes_moved=rows * (2 * classes * BYTES[dtype] + 8),
        absent=absent,
    )


def build_linear(setup: Setup, *, rows: int, hidden: int, classes: int) -> Workload:
    """Mean StableMax cross-entropy of ``h W^T`` and its gradients in h and W."""
    from flcore.losses import stablemax_linear_cross_entropy

    torch: Any = optional("torch")[0]
    draw = torch.Generator().manual_seed(setup.seed)
    h = torch.empty((rows, hidden)).normal_(0, 1, generator=draw)
    w = torch.empty((classes, hidden)).normal_(0, 2 / hidden**0.5, generator=draw)
    y = torch.randint(0, classes, (rows,), generator=draw)
    h, w, y = h.to(setup.device), w.to(setup.device), y.to(setup.device)
    grads = torch.empty_like(h), torch.empty_like(w)
    logits = torch.empty((min(rows, 256), classes), device=h.device)
    h.requires_grad_()
    w.requires_grad_()
    in_float = peers.stablemax_loss("float32")

    def step(loss: Callable[[Any, Any, Any], Any], slot: int) -> tuple[Any, Any]:
        h.grad = w.grad = None
        value = loss(h, w, y)
        value.backward()
        return value.detach(), h.grad

    def products(slot: int) -> tuple[Any, Any]:
        """Three products that any method needs, a block of rows at a time; no loss."""
        with torch.no_grad():
            for first in range(0, rows, len(logits)):
                part = h[first : first + len(logits)]
                z = torch.mm(part, w.T, out=logits[: len(part)])
                torch.mm(z, w, out=grads[0][first : first + len(part)])
                torch.addmm(grads[1], z.T, part, beta=int(first > 0), out=grads[1])
        return torch.tensor(0.0), grads[0]

    def unfused(x: Any, weight: Any, labels: Any) -> Any:
        return in_float(x @ weight.T, labels)

    def softmax(x: Any, weight: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy(x @ weight.T, labels)

    def anything(slot: int, result: np.ndarray) -> None:
        return None

    picked = torch.from_numpy(_sample(rows)).to(h.device)
    with torch.no_grad():
        z = h @ w.T
    z.requires_grad_()
    expected = _expected(z, y, "stablemax")
    with torch.no_grad():
        by_logit = torch.from_numpy(expected[1:].reshape(len(picked), classes)).to(h.device)
        by_hidden = (by_logit @ w.double()).cpu().numpy().reshape(-1)
    del z
    expected = np.concatenate([expected[:1], by_hidden])
    contestants = [
        Contestant("flcore", partial(step, stablemax_linear_cross_entropy), _to_numpy, kind="ours"),
        Contestant("three torch products alone", products, _to_numpy, matches=anything),
        Contestant(
            "torch linear, float32 chain",
            partial(step, unfused),
            _to_numpy,
            matches=_check(expected, CHAIN_TOLERANCE),
        ),
        Contestant(
            "torch linear, F.cross_entropy (softmax)",
            partial(step, softmax),
            _to_numpy,
            matches=anything,
        ),
    ]
    return Workload(
        contestants=contestants,
        matches=_check(expected, 2e-5),
        bytes_moved=8 * hidden * (rows + classes),
    )


def _case(
    name: str,
    title: str,
    rows: int,
    classes: int,
    kind: str,
    dtype: str = "float32",
    note: str = "",
    **peers: Any,
) -> Case:
    size = BYTES[dtype]
    return Case(
        name=name,
        family="losses",
        title=f"{title}, {rows:,} x {classes:,}, forward and backward",
        formula=f"{2 * size}·rows·classes + 8·rows: read logits and labels, write the gradient",
        build=partial(build_cross_entropy, kind=kind, dtype=dtype, **peers),
        sizes={"rows": rows, "classes": classes},
        tiny={"rows": 64, "classes": min(classes, 301)},
        dtype=dtype,
        bound="copy",
        devices=("cpu", "cuda"),
        needs=("torch",),
        note=note,
    )


LARGE = (4096, 32_000, "stablemax")
CASES = [
    _case("stablemax_ce_4096x32000", "StableMax cross-entropy", *LARGE, chains=False),
    _case(
        "stablemax_ce_chains",
        "StableMax cross-entropy beside eager chains",
        *LARGE,
        note="A chain takes seconds and gigabytes, after which the logits are cold for flcore too.",
        others=False,
    ),
    _case("stablemax_ce_524288x12", "StableMax cross-entropy", 524_288, 12, "stablemax"),
    _case("stablemax_ce_bf16", "StableMax cross-entropy", *LARGE, "bfloat16"),
    _case("softmax_ce_4096x32000", "softmax cross-entropy", 4096, 32_000, "softmax"),
    _case("softmax_ce_524288x12", "softmax cross-entropy", 524_288, 12, "softmax"),
    Case(
        name="stablemax_linear_ce",
        family="losses",
        title="StableMax cross-entropy of a linear layer, 4,096 x 1,024 x 32,000",
        formula="8·hidden·(rows + classes): hidden states and weights and their gradients, once",
        build=build_linear,
        sizes={"rows": 4096, "hidden": 1024, "classes": 32_000},
        tiny={"rows": 300, "hidden": 32, "classes": 301},
        bound="copy",
        devices=("cpu", "cuda"),
        needs=("torch",),
        note="Bound by arithmetic: the products alone are the contestant to compare with.",
    ),
]
