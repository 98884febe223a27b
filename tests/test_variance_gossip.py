"""Gossip learning on digits: what variance correction is for, and where it has nothing to do."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation import VarianceCorrected


def accuracy(weights, images, labels) -> float:
    w1, b1, w2, b2 = weights
    return float((np.argmax(np.maximum(images @ w1 + b1, 0) @ w2 + b2, axis=1) == labels).mean())


def local_step(weights, images, labels, rate) -> None:
    """One step of gradient descent of a two-layer network on one batch, in place."""
    w1, b1, w2, b2 = weights
    hidden = np.maximum(images @ w1 + b1, 0)
    logits = hidden @ w2 + b2
    logits = np.exp(logits - logits.max(axis=1, keepdims=True))
    error = logits / logits.sum(axis=1, keepdims=True)
    error[np.arange(len(labels)), labels] -= 1
    error /= len(labels)
    back = (error @ w2.T) * (hidden > 0)
    for x, gradient in zip(
        weights, (images.T @ back, back.sum(0), hidden.T @ error, error.sum(0)), strict=True
    ):
        x -= (rate * gradient).astype(np.float32)


def averaged(received, mine, ratio: float):
    corrected = VarianceCorrected(ratio=ratio)
    for model in received:
        corrected.add(model)
    return corrected.result(mine)


def four_neighbours(rng: np.random.Generator, nodes: int) -> list[list[int]]:
    """Return a random 4-regular graph: two rings without a common edge."""
    while True:
        edges = set()
        for _ in range(2):
            ring = rng.permutation(nodes).tolist()
            edges |= {frozenset(pair) for pair in zip(ring, ring[1:] + ring[:1], strict=True)}
        if len(edges) == 2 * nodes:
            return [[j for e in edges if i in e for j in e - {i}] for i in range(nodes)]


def rounds_to_90_percent(ratio: float, same_start: bool, nodes: int = 16) -> int:
    """Gossip on the 8 x 8 digits; every node takes five local steps between averagings."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    images, labels = (images / 16).astype(np.float32)[order], labels[order]
    shards = np.array_split(np.arange(400, len(images)), nodes)
    graph = four_neighbours(rng, nodes)

    def network(start: np.random.Generator) -> list[np.ndarray]:
        shapes = ((64, 64), (64,), (64, 10), (10,))
        scale = (2 / 64) ** 0.5
        return [(start.standard_normal(s) * scale * (len(s) > 1)).astype("f4") for s in shapes]

    models = [network(np.random.default_rng(7 if same_start else 100 + i)) for i in range(nodes)]
    for done in range(1, 100):
        for model, shard in zip(models, shards, strict=True):
            for _ in range(5):
                batch = rng.choice(shard, 32)
                local_step(model, images[batch], labels[batch], rate=0.2)
        models = [
            averaged([models[j] for j in neighbours], mine, ratio)
            for mine, neighbours in zip(models, graph, strict=True)
        ]
        right = [
            accuracy(m, images[i : i + 50], labels[i : i + 50])  # too small for threads of BLAS
            for m in models
            for i in range(0, 400, 50)
        ]
        if np.mean(right) >= 0.9:
            return done
    return 100


@pytest.mark.slow
def test_gossip_learns_faster_when_the_networks_start_apart():
    pytest.importorskip("sklearn")
    plain, corrected = (rounds_to_90_percent(ratio, same_start=False) for ratio in (0.0, 1.0))
    assert corrected < 40 and plain >= 1.5 * corrected
    plain, corrected = (rounds_to_90_percent(ratio, same_start=True) for ratio in (0.0, 1.0))
    assert abs(plain - corrected) <= 2  # nothing vanished, nothing to correct
