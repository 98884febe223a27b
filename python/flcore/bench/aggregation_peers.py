"""What users run today for a weighted mean: the contestants that flcore is paired with.

Each function returns the peers that can run and, for those that cannot, the reason.  Everything a
user could prepare once (normalised weights, torch views, the stacked matrix) is prepared here and
not timed.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np

from flcore.bench.byzfl_peer import byzfl_aggregators
from flcore.bench.cases import Setup
from flcore.bench.environment import BLAS_SPIN_S, optional
from flcore.bench.field import Absent, Field
from flcore.bench.timers import Contestant
from flcore.bench.updates import UNIT_ROUNDOFF, Updates

__all__ = ["mean_peers", "streaming_peers"]


def _as_torch(torch: Any, matrix: Any) -> Any:
    return torch.from_numpy(matrix) if isinstance(matrix, np.ndarray) else matrix


def mean_peers(data: Updates, setup: Setup) -> tuple[list[Contestant], Absent]:
    """Peers for the mean of resident updates, flat or in layers."""
    field = Field()
    if data.shapes is None:
        _numpy_flat(field, data, setup)
        _torch_flat(field, data, setup)
    else:
        _numpy_layers(field, data, setup)
        _torch_layers(field, data, setup)
    _byzfl(field, data, setup)
    _flower(field, data, setup)
    return field.peers, field.absent


def _numpy_cannot(data: Updates, setup: Setup) -> str | None:
    """Why NumPy cannot take part, or None."""
    if setup.device != "cpu":
        return "no CUDA arrays in NumPy"
    return "no bfloat16 in NumPy" if data.dtype == "bfloat16" else None


def _numpy_flat(field: Field, data: Updates, setup: Setup) -> None:
    names = "numpy reduce(np.add, [x * w ...])", "numpy weights @ stacked"
    if reason := _numpy_cannot(data, setup):
        return field.leave_out(reason, *names)
    stacked = [np.asarray(matrix) for matrix in data.stacked]
    weights = data.portions.astype(stacked[0].dtype)
    rows = [list(matrix) for matrix in stacked]
    coarse = _half_check(data)
    field.add(
        names[0],
        lambda slot: reduce(np.add, [x * w for x, w in zip(rows[slot], weights, strict=True)]),
        coarse,
    )
    field.add(names[1], lambda slot: weights @ stacked[slot], coarse, BLAS_SPIN_S)


def _half_check(data: Updates) -> Any:
    """Check for peers that accumulate in the type of the inputs; None means the strict check."""
    return None if data.dtype == "float32" else data.check(UNIT_ROUNDOFF[data.dtype])


def _torch_flat(field: Field, data: Updates, setup: Setup) -> None:
    matmul, widened = "torch weights @ stacked", "torch weights @ stacked.float()"
    foreach, compiled = "torch _foreach_add_", "torch.compile of sum(w * x)"
    torch, reason = optional("torch")
    if torch is None:
        return field.leave_out(reason, matmul, foreach, compiled)
    stacked = [_as_torch(torch, matrix) for matrix in data.stacked]
    rows = [list(matrix.unbind()) for matrix in stacked]
    portions = data.portions
    weights = torch.from_numpy(portions).to(stacked[0])
    alphas = portions.tolist()
    coarse = _half_check(data)

    field.add(matmul, lambda slot: weights @ stacked[slot], coarse)
    if data.dtype != "float32":
        wide = torch.from_numpy(portions).to(stacked[0].device)
        field.add(widened, lambda slot: (wide @ stacked[slot].float()).to(weights.dtype))

    def add_in_place(slot: int) -> Any:
        first, *others = rows[slot]
        total = torch._foreach_mul([first], alphas[0])
        for row, alpha in zip(others, alphas[1:], strict=True):
            torch._foreach_add_(total, [row], alpha=alpha)
        return total[0]

    field.add(foreach, add_in_place, coarse)

    if not setup.compiled:
        return field.leave_out("left out on request", compiled)
    factors = torch.from_numpy(portions).to(stacked[0].device)

    def weighted_sum(xs: list[Any], ws: Any) -> Any:
        total = xs[0].float() * ws[0]
        for i in range(1, len(xs)):
            total = total + xs[i].float() * ws[i]
        return total.to(xs[0].dtype)

    fused = torch.compile(weighted_sum)
    field.add(compiled, lambda slot: fused(rows[slot], factors))


def _numpy_layers(field: Field, data: Updates, setup: Setup) -> None:
    name = "numpy reduce(np.add, [x * w ...]) per layer"
    if reason := _numpy_cannot(data, setup):
        return field.leave_out(reason, name)
    updates, weights = data.updates(), data.portions

    def per_layer(slot: int) -> list[np.ndarray]:
        scaled = [[x * w for x in update] for update, w in zip(updates[slot], weights, strict=True)]
        return [reduce(np.add, layers) for layers in zip(*scaled, strict=True)]

    field.add(name, per_layer)


def _torch_layers(field: Field, data: Updates, setup: Setup) -> None:
    names = "torch _foreach_add_", "torch stack and tensordot per layer"
    torch, reason = optional("torch")
    if torch is None:
        return field.leave_out(reason, *names)
    updates = data.updates(lambda matrix: _as_torch(torch, matrix))
    alphas = data.portions.tolist()
    weights = torch.from_numpy(data.portions).to(updates[0][0][0].device)

    def add_in_place(slot: int) -> Any:
        first, *others = updates[slot]
        total = torch._foreach_mul(first, alphas[0])
        for update, alpha in zip(others, alphas[1:], strict=True):
            torch._foreach_add_(total, update, alpha=alpha)
        return total

    def stack(slot: int) -> Any:
        layers = zip(*updates[slot], strict=True)
        return [torch.tensordot(weights, torch.stack(xs), dims=1) for xs in layers]

    field.add(names[0], add_in_place)
    field.add(names[1], stack)


def _byzfl(field: Field, data: Updates, setup: Setup) -> None:
    name = "byzfl Average (unweighted)"
    if data.shapes is not None:
        return field.leave_out("takes flat vectors only", name)
    byzfl, reason = byzfl_aggregators()
    if byzfl is None:
        return field.leave_out(reason, name)
    average = byzfl.Average()
    clients = len(data.weights)
    uniform = np.full(clients, 1 / clients)
    check = data.check(UNIT_ROUNDOFF[data.dtype], uniform)
    field.add(name, lambda slot: average(data.stacked[slot]), check)


def _flower(field: Field, data: Updates, setup: Setup) -> None:
    name = "flwr aggregate"
    if data.dtype != "float32" or setup.device != "cpu":
        return field.leave_out("takes NumPy arrays only", name)
    module, reason = optional("flwr.server.strategy.aggregate")
    if module is None:
        return field.leave_out(reason, name)
    aggregate = module.aggregate
    examples = [int(q) for q in data.weights]
    as_layers = (lambda update: update) if data.shapes else (lambda update: [update])
    received = [
        [(as_layers(update), n) for update, n in zip(updates, examples, strict=True)]
        for updates in data.updates()
    ]
    field.add(name, lambda slot: aggregate(received[slot]))


def streaming_peers(data: Updates, setup: Setup) -> tuple[list[Contestant], Absent]:
    """Peers for the streaming mean of flat updates."""
    field = Field()
    numpy_name, torch_name = "numpy acc += w * x", "torch acc.add_(x, alpha=w)"
    weights = [float(q) for q in data.weights]
    total_weight = sum(weights)

    if reason := _numpy_cannot(data, setup):
        field.leave_out(reason, numpy_name)
    else:
        rows = data.updates()
        sums = np.zeros_like(rows[0][0])

        def with_numpy(slot: int) -> np.ndarray:
            acc = sums
            acc.fill(0)
            for row, weight in zip(rows[slot], weights, strict=True):
                acc += row * np.float32(weight)
            return acc / np.float32(total_weight)

        field.add(numpy_name, with_numpy)

    torch, reason = optional("torch")
    if torch is None:
        field.leave_out(reason, torch_name)
    else:
        tensors = data.updates(lambda matrix: _as_torch(torch, matrix))
        running = torch.zeros_like(tensors[0][0])

        def with_torch(slot: int) -> Any:
            running.zero_()
            for row, weight in zip(tensors[slot], weights, strict=True):
                running.add_(row, alpha=weight)
            return running / total_weight

        field.add(torch_name, with_torch)
    return field.peers, field.absent
