"""Cases of the simulation family: the local training of all clients of one round.

Ours trains the clients together (`flcore.simulation.batched`); beside it stand our trainer for one
client after another, the loop that a user of torch writes, and `torch.func.vmap` in that loop. All
see the same mini-batches. The examples are random, of the shape of scikit-learn's digits: nothing
here depends on their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_round"]

LR, DECAY, CLIP = 0.1, 1e-3, 10.0
SHAPE, CLASSES, HIDDEN = (1, 8, 8), 10, 64
CLOSE = 1e-4  # of a parameter after some dozen float32 steps, to float64

Batches = list[list[tuple[Any, Any]]]
"""Examples and labels of the mini-batches of each client."""


def build_round(
    setup: Setup, *, clients: int, participants: int, examples: int, epochs: int, batch_size: int
) -> Workload:
    """Train `participants` of `clients` with the MLP, each on `examples` examples."""
    import torch

    from flcore.algorithms import DataView, LocalWork, StepSpec
    from flcore.simulation.batched import BatchedTrainer
    from flcore.simulation.local import Job, LocalTrainer
    from flcore.simulation.models import build_model

    rng = setup.rng()
    x = torch.from_numpy(rng.standard_normal((clients * examples, *SHAPE)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, CLASSES, clients * examples))
    one = LocalTrainer(build_model("mlp", SHAPE, CLASSES, rng), x, y)
    work = LocalWork(one.initial, StepSpec(lr=LR, decay=DECAY, clip=CLIP))
    jobs, batches = [], []
    for i in rng.choice(clients, participants, replace=False).tolist():
        own = np.arange(i * examples, (i + 1) * examples)
        view = DataView.epochs(own, epochs, batch_size, rng)
        jobs.append(Job(i, work, view, seed=0))
        parts = torch.from_numpy(view.order).split(view.sizes)
        batches.append([(x[part], y[part]) for part in parts])
    model = build_model("mlp", SHAPE, CLASSES, setup.rng())
    together = BatchedTrainer(one)

    def ends(results: Sequence[Any]) -> np.ndarray:
        return np.concatenate([result.end for result in results])

    expected = _loop(_like(model, one.initial).double(), batches)
    plain, stacked = _like(model, one.initial), _like(model, one.initial)
    contestants = [
        Contestant("flcore BatchedTrainer", lambda slot: together.train(jobs), ends, kind="ours"),
        Contestant("flcore LocalTrainer", lambda slot: one.train(jobs), ends, kind="variant"),
        Contestant("torch loop", lambda slot: _loop(plain, batches), np.asarray),
        Contestant("torch.func.vmap", lambda slot: _vmapped(stacked, batches), np.asarray),
    ]
    steps = sum(len(job.view.sizes) for job in jobs)
    return Workload(
        contestants=contestants,
        matches=lambda slot, found: difference(found, expected, CLOSE),
        bytes_moved=20 * one.numel * steps,
    )


def _like(model: Any, start: np.ndarray) -> Any:
    """Give a copy of the model with these parameters."""
    import copy

    import torch

    model = copy.deepcopy(model)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(start.copy()), model.parameters())
    return model


def _loop(model: Any, batches: Batches) -> np.ndarray:
    """Train one client after another, as one does with torch; gives all their parameters."""
    import torch
    from torch.nn.functional import cross_entropy

    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    ends = []
    for mine in batches:
        optimizer = torch.optim.SGD(parameters, lr=LR, weight_decay=DECAY)
        for x, y in mine:
            optimizer.zero_grad()
            cross_entropy(model(x.to(start[0].dtype)), y).backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
        ends += [p.detach().reshape(-1).clone() for p in parameters]
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
    return torch.cat(ends).numpy()


def _vmapped(model: Any, batches: Batches) -> np.ndarray:
    """Train clients with equal mini-batches together by `torch.func`, without recording."""
    import torch
    from torch.func import functional_call, grad, vmap
    from torch.nn.functional import cross_entropy

    def loss(parameters: dict[str, Any], x: Any, y: Any) -> Any:
        return cross_entropy(functional_call(model, parameters, (x,)), y)

    gradient = vmap(grad(loss))
    n = len(batches)
    with torch.no_grad():
        stacked = {k: p.expand(n, *p.shape).clone() for k, p in model.named_parameters()}
        for step in zip(*batches, strict=True):
            x, y = (torch.stack(part) for part in zip(*step, strict=True))
            grads = gradient(stacked, x, y)
            squares = sum(g.flatten(1).square().sum(1) for g in grads.values())
            scale = (CLIP / squares.sqrt()).clamp(max=1.0)
            for name, p in stacked.items():
                g = grads[name] * scale.view(-1, *[1] * (p.ndim - 1))
                p.sub_(LR * (g + DECAY * p))
    return torch.cat([p.reshape(n, -1) for p in stacked.values()], 1).flatten().numpy()


def _case(name: str, clients: int, participants: int, examples: int) -> Case:
    return Case(
        name=name,
        family="simulation",
        title=f"local training of {participants} of {clients:,} clients with {examples} examples "
        f"each: MLP of 64-{HIDDEN}-10 units, batches of 10, 5 epochs",
        formula="20·d for each step of a client: parameters read, gradient written; both read, "
        "parameters written",
        build=build_round,
        sizes={
            "clients": clients,
            "participants": participants,
            "examples": examples,
            "epochs": 5,
            "batch_size": 10,
        },
        tiny={
            "clients": 6,
            "participants": 3,
            "examples": 7,
            "epochs": 1,
            "batch_size": 4,
        },
        bound="copy",
        needs=("torch",),
        hot=True,
        note="Gradients are clipped to a norm of 10 and decayed. The torch loop is zero_grad, "
        "backward, clip_grad_norm_ and SGD with weight decay, its batches gathered beforehand.",
    )


CASES = [
    _case("round_5_of_50", 50, 5, 29),
    _case("round_100_of_1000", 1000, 100, 14),
]
