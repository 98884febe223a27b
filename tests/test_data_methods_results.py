"""What curricula, GGEUR, FedRAM and late updates are said to do, at the size of a test."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")
save_file = pytest.importorskip("safetensors.numpy").save_file

from flcore.algorithms import GGEUR, Algorithm, Curriculum, FedAvg, FedRAM, Staleness
from flcore.simulation import Dataset, Settings, Simulation, load_dataset, run

pytestmark = pytest.mark.slow

DENSE = {"codec": None, "feedback": None}


# ---- curricula -----------------------------------------------------------------------------------


def expert(seed: int, path) -> str:
    """A model trained on all data, with the same wrong labels."""
    settings = Settings(clients=1, participation=1, alpha=None, rounds=10, seed=seed, **NOISY)
    history = run(FedAvg(local_epochs=1, local_lr=0.05), "mlp", "digits", settings)
    save_file({n: np.ascontiguousarray(v) for n, v in history.model.items()}, path)
    return str(path)


NOISY = DENSE | {"label_noise": 0.18}


def test_easy_examples_first_helps_where_labels_are_wrong(tmp_path):
    found = {"curr": [], "rand": [], "anti": []}
    for seed in range(3):
        model = expert(seed, tmp_path / f"{seed}.safetensors")
        for ordering, accuracies in found.items():
            algorithm = Curriculum(
                ordering=ordering, scoring="E", expert=model, least=10, local_lr=0.05
            )
            settings = Settings(
                clients=20, participation=4, alpha=0.1, rounds=15, seed=seed, **NOISY
            )
            history = run(algorithm, "mlp", "digits", settings)
            accuracies.append(100 * np.mean([r.accuracy for r in history.records[8:]]))
    curr, rand, anti = (np.mean(found[name]) for name in ("curr", "rand", "anti"))
    assert curr > rand + 0.5
    assert rand > anti + 2.0


# ---- GGEUR ---------------------------------------------------------------------------------------


def gaussians(seed: int) -> Dataset:
    """Ten normal classes of one covariance."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(20, 20)))[0] * np.sqrt(4.0 * 0.75 ** np.arange(20))
    means = 0.35 * rng.normal(size=(10, 20))

    def part(n: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.integers(10, size=n)
        return means[y] + rng.normal(size=(n, 20)) @ axes.T, y

    return Dataset("gaussians", *part(300), *part(4000))


def test_global_directions_are_better_than_duplicates():
    found = {"none": [], "sqrt": [], "lambda": []}
    for seed in range(3):
        data = gaussians(seed)
        for noise, accuracies in found.items():
            algorithm = GGEUR(
                noise=noise, target=60, local_epochs=1, batch_size=20, weight_decay=0.0
            )
            settings = Settings(
                clients=10, participation=10, alpha=0.1, rounds=15, seed=seed, **DENSE
            )
            history = run(algorithm, "linear", data, settings)
            accuracies.append(100 * np.mean([r.accuracy for r in history.records[-5:]]))
    duplicates, root, whole = (np.mean(found[name]) for name in ("none", "sqrt", "lambda"))
    assert root > duplicates + 2
    assert whole > root - 1


# ---- FedRAM --------------------------------------------------------------------------------------


def unequal_tasks(seed: int) -> Dataset:
    """Three tasks of three classes each on shared inputs, with 1200, 240 and 60 examples."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(12, 12)) / np.sqrt(12)
    centres = rng.normal(size=(3, 3, 12))
    places = rng.normal(size=(3, 1, 12))

    def part(sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        task = np.repeat(np.arange(3), sizes)
        y = rng.integers(3, size=len(task))
        z = (centres + places)[task, y] + rng.normal(size=(len(task), 12))
        return np.tanh(z @ mix), 3 * task + y, task

    (x, y, task), (x_test, y_test, task_test) = part((1200, 240, 60)), part((600,) * 3)
    return Dataset("tasks", x, y, x_test, y_test, groups_train=task, groups_test=task_test)


def by_task(algorithm: Algorithm, data: Dataset, seed: int) -> np.ndarray:
    settings = Settings(clients=6, participation=6, alpha=1.0, rounds=30, seed=seed, **DENSE)
    simulation = Simulation(algorithm, "mlp:16", data, settings)
    for _ in range(30):
        simulation.step()
    scores = simulation.server.tools.scores(simulation.server.model, data.x_test)
    right = scores.argmax(1) == data.y_test
    return np.array([100 * right[data.groups_test == task].mean() for task in range(3)])


def test_reweighting_lifts_the_worst_task_and_not_at_the_cost_of_the_mean():
    options = {"local_epochs": 2, "batch_size": 20, "weight_decay": 0.0, "lr_decay": 1.0}
    plain, ours = [], []
    for seed in range(3):
        data = unequal_tasks(seed)
        plain.append(by_task(FedAvg(**options), data, seed))
        ours.append(by_task(FedRAM(tasks="groups", **options), data, seed))
    assert np.min(ours, axis=1).mean() > np.min(plain, axis=1).mean() + 3
    assert np.mean(ours) > np.mean(plain) - 1


# ---- late updates --------------------------------------------------------------------------------


def accuracy_on_the_late_class(delay: int, correction: str) -> float:
    """Mean over rounds 11 to 40, of the digit 5, which only two late clients of twenty have."""
    data, rng = load_dataset("digits"), np.random.default_rng(1)
    held, rest = (
        rng.permutation(np.flatnonzero(m)) for m in (data.y_train == 5, data.y_train != 5)
    )
    parts = [*np.array_split(rest, 18), *np.array_split(held, 2)]
    algorithm = Staleness(
        stale=(18, 19),
        delay=delay,
        correction=correction,
        local_epochs=5,
        batch_size=2000,
        weight_decay=0.0,
        weighting="uniform",
    )
    settings = Settings(clients=20, participation=20, rounds=40, seed=1, **DENSE)
    simulation = Simulation(algorithm, "mlp:16", data, settings, partition=parts)
    own, found = data.y_test == 5, []
    for _ in range(40):
        simulation.step()
        scores = simulation.server.tools.scores(simulation.server.model, data.x_test[own])
        found.append((scores.argmax(1) == 5).mean())
    return 100 * float(np.mean(found[10:]))


def test_a_class_that_comes_late_suffers_and_suffers_more_when_weighted_down():
    fresh, direct, weighted = (
        accuracy_on_the_late_class(*case)
        for case in ((0, "direct"), (10, "direct"), (10, "weighted"))
    )
    assert fresh > direct + 15
    assert direct > weighted + 5
