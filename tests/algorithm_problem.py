"""Small federated problems for tests of algorithms that need a model and data."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore.algorithms import Algorithm
from flcore.simulation import Dataset, Settings, Simulation

PLAIN: dict[str, Any] = {
    "local_lr": 0.1,
    "lr_decay": 1.0,
    "weight_decay": 0.0,
    "clip": None,
    "local_epochs": 2,
    "batch_size": 8,
}


def blobs(
    seed: int = 0, clients: int = 3, each: int = 12, shape: tuple[int, ...] = (4,)
) -> Dataset:
    """Three classes around three points; groups deal them to clients, each shifted its own way."""
    rng = np.random.default_rng(seed)
    centres = 1.5 * rng.standard_normal((3, *shape))

    def part(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        y = np.arange(count * clients) % 3
        groups = np.repeat(np.arange(clients), count)
        shift = groups.reshape(-1, *[1] * len(shape)) * 0.5
        return centres[y] + 0.4 * rng.standard_normal((len(y), *shape)) + shift, y, groups

    (x, y, g), (x_test, y_test, g_test) = part(each), part(6)
    return Dataset("blobs", x, y, x_test, y_test, groups_train=g, groups_test=g_test)


def simulation(
    algorithm: Algorithm, model: Any, data: Dataset | None = None, rounds: int = 3, **options: Any
) -> Simulation:
    """Make a run in which each group of the data is a client, and all take part."""
    data = data or blobs()
    assert data.groups_train is not None
    server = options.pop("server_examples", None)
    groups = sorted(set(data.groups_train.tolist()) - set(options.pop("without", ())))
    partition = [np.flatnonzero(data.groups_train == group) for group in groups]
    settings = Settings(
        rounds=rounds,
        clients=len(partition),
        participation=options.pop("participation", len(partition)),
        **{"codec": None, "feedback": None} | options,
    )
    return Simulation(algorithm, model, data, settings, partition=partition, server_examples=server)


def play(run: Simulation, rounds: int) -> list[np.ndarray]:
    """Do so many rounds, and give the global model after each."""
    models = []
    for _ in range(rounds):
        run.step()
        models.append(run.server.model.copy())
    return models
