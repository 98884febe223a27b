"""What users run today for top-k with error control and for summing sparse updates."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore.bench.cases import Setup
from flcore.bench.environment import BLAS_SPIN_S, optional
from flcore.bench.timers import Contestant

__all__ = ["econtrol_peers", "sparse_sum_peers", "top_k_peers"]


def econtrol_peers(
    gradients: list[np.ndarray], k: int, setup: Setup
) -> tuple[list[Contestant], dict[str, str]]:
    """EControl with top-k as a chain of library calls; each peer keeps its own state e, h."""
    eager, compiled = "torch chain with topk", "torch.compile of the chain"
    contestants = [_numpy_econtrol(gradients, k)]
    absent: dict[str, str] = {}
    torch, reason = optional("torch")
    if torch is None:
        return contestants, dict.fromkeys((eager, compiled), reason)
    contestants.append(_torch_econtrol(torch, gradients, k, eager, lambda step: step))
    if setup.compiled:
        contestants.append(_torch_econtrol(torch, gradients, k, compiled, torch.compile))
    else:
        absent[compiled] = "left out on request"
    return contestants, absent


def _dense(numel: int) -> Any:
    """Return a function that turns (index, value) pairs into the dense message."""

    def scatter(pair: tuple[Any, Any]) -> np.ndarray:
        message = np.zeros(numel, np.float32)
        message[np.asarray(pair[0])] = np.asarray(pair[1])
        return message

    return scatter


def _numpy_econtrol(gradients: list[np.ndarray], k: int) -> Contestant:
    numel = gradients[0].size
    eta = np.float32(k / numel)
    e, h = np.zeros(numel, np.float32), np.zeros(numel, np.float32)

    def step(slot: int) -> tuple[np.ndarray, np.ndarray]:
        error, estimate, g = e, h, gradients[slot]
        u = eta * error + g - estimate
        index = np.argpartition(np.abs(u), numel - k)[numel - k :]
        values = u[index]
        error += g - estimate
        error[index] -= values
        estimate[index] += values
        return index, values

    def reset() -> None:
        e.fill(0)
        h.fill(0)

    return Contestant("numpy chain with argpartition", step, _dense(numel), reset)


def _torch_econtrol(
    torch: Any, gradients: list[np.ndarray], k: int, name: str, wrap: Any
) -> Contestant:
    numel = gradients[0].size
    eta = k / numel
    inputs = [torch.from_numpy(g) for g in gradients]
    e, h = torch.zeros(numel), torch.zeros(numel)

    def step(g: Any, error: Any, estimate: Any) -> tuple[Any, Any]:
        u = eta * error + g - estimate
        index = torch.topk(u.abs(), k, sorted=False).indices
        values = torch.gather(u, 0, index)
        sent = torch.zeros_like(u).scatter_(0, index, values)
        error.add_(g).sub_(estimate).sub_(sent)
        estimate.add_(sent)
        return index, values

    run = wrap(step)

    def reset() -> None:
        e.zero_()
        h.zero_()

    return Contestant(name, lambda slot: run(inputs[slot], e, h), _dense(numel), reset)


def top_k_peers(updates: list[np.ndarray], k: int) -> tuple[list[Contestant], dict[str, str]]:
    """Indices and values of the k largest magnitudes."""
    numel = updates[0].size

    def partition(slot: int) -> tuple[np.ndarray, np.ndarray]:
        u = updates[slot]
        index = np.argpartition(np.abs(u), numel - k)[numel - k :]
        return index, u[index]

    dense = _dense(numel)
    contestants = [Contestant("numpy argpartition", partition, dense)]
    name = "torch topk"
    torch, reason = optional("torch")
    if torch is None:
        return contestants, {name: reason}
    tensors = [torch.from_numpy(u) for u in updates]

    def topk(slot: int) -> tuple[Any, Any]:
        u = tensors[slot]
        index = torch.topk(u.abs(), k, sorted=False).indices
        return index, u[index]

    contestants.append(Contestant(name, topk, dense))
    return contestants, {}


def sparse_sum_peers(
    pairs: list[tuple[np.ndarray, np.ndarray]], weights: np.ndarray, numel: int
) -> tuple[list[Contestant], dict[str, str]]:
    """Sum of sparse updates: dense product, or index by index, from already decoded arrays."""
    stacked = np.zeros((len(pairs), numel), np.float32)
    for row, (index, values) in zip(stacked, pairs, strict=True):
        row[index] = values
    total = np.zeros(numel, np.float32)

    def add_numpy(slot: int) -> np.ndarray:
        for (index, values), weight in zip(pairs, weights, strict=True):
            total[index] += weight * values
        return total

    contestants = [
        Contestant(
            "numpy weights @ stacked (dense)", lambda slot: weights @ stacked, rest_s=BLAS_SPIN_S
        ),
        Contestant("numpy out[index] += w * value", add_numpy, reset=lambda: total.fill(0)),
    ]
    names = "torch weights @ stacked (dense)", "torch index_add_"
    torch, reason = optional("torch")
    if torch is None:
        return contestants, dict.fromkeys(names, reason)

    dense, factors = torch.from_numpy(stacked), torch.from_numpy(weights)
    tensors = [(torch.from_numpy(index), torch.from_numpy(values)) for index, values in pairs]
    alphas = weights.tolist()
    sums = torch.zeros(numel)

    def add_torch(slot: int) -> Any:
        for (index, values), alpha in zip(tensors, alphas, strict=True):
            sums.index_add_(0, index, values, alpha=alpha)
        return sums

    contestants += [
        Contestant(names[0], lambda slot: factors @ dense),
        Contestant(names[1], add_torch, reset=lambda: sums.zero_()),
    ]
    return contestants, {}
