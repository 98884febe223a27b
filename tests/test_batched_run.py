"""Whole runs: algorithms end where they end when clients are trained one after another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from flcore.algorithms import (
    FedAvg,
    FedBN,
    FedFree,
    FedGPS,
    FedGPSGoal,
    FedKA,
    FedRAM,
    FedSAM,
    FedSMOO,
    FedSpeed,
    FedWon,
    Moon,
    Scaffold,
)
from flcore.errors import InvalidInputError
from flcore.simulation import Dataset, Settings, run
from flcore.simulation.local import LocalTrainer

CLIENTS, CLASSES = 6, 4


@pytest.fixture(scope="module")
def data() -> Dataset:
    rng = np.random.default_rng(1)
    y = rng.integers(0, CLASSES, 220)
    centres = rng.standard_normal((CLASSES, 1, 8, 8))
    x = (centres[y] + 0.8 * rng.standard_normal((220, 1, 8, 8))).astype(np.float32)
    return Dataset("blobs", x[:180], y[:180], x[180:], y[180:])


def settings(**changes: Any) -> Settings:
    plain: dict[str, Any] = {"codec": None, "feedback": None, "alpha": 0.3, "seed": 3}
    return Settings(clients=CLIENTS, participation=4, **{"rounds": 3} | plain | changes)


SHORT: dict[str, Any] = {"local_epochs": 2}


@pytest.mark.parametrize(
    "algorithm",
    [
        FedAvg(**SHORT, local_momentum=0.5),
        Scaffold(**SHORT),
        FedSpeed(**SHORT),
        FedSAM(**SHORT),
        FedSMOO(**SHORT),
        FedGPS(**SHORT),
        FedGPSGoal(local_epochs=1, batch_size=32),
        FedBN(**SHORT),
        FedWon(**SHORT),
        FedFree(**SHORT),
        FedRAM(**SHORT),
        Moon(**SHORT, local_lr=0.05),
    ],
    ids=lambda algorithm: algorithm.name,
)
def test_algorithms(algorithm, data, monkeypatch):
    histories = [run(algorithm, "mlp", data, settings(execution="sequential"))]
    alone: list[Any] = []
    train = LocalTrainer._train
    monkeypatch.setattr(LocalTrainer, "_train", lambda *a: alone.append(a) or train(*a))
    histories.append(run(algorithm, "mlp", data, settings(execution="batched")))
    assert not alone
    expected, found = histories
    for name, value in expected.model.items():
        np.testing.assert_allclose(found.model[name], value, atol=1e-5)
    for a, b in zip(expected.records, found.records, strict=True):
        assert a.clients == b.clients and a.bytes_up == b.bytes_up
        np.testing.assert_allclose(a.train_loss, b.train_loss, rtol=1e-4)


def test_domains_of_the_server(data):
    """FedKA's loss does different things in different steps."""
    parts = np.array_split(np.arange(40, 180), CLIENTS)
    found = [
        run(
            FedKA(batches=4, accumulate=2, vote_batches=4),
            "mlp",
            data,
            settings(execution=execution, rounds=1),
            partition=parts,
            server_examples=np.arange(40),
        )
        for execution in ("sequential", "batched")
    ]
    for name, value in found[0].model.items():
        np.testing.assert_allclose(found[1].model[name], value, atol=1e-5)


def test_the_same_bits_again(data):
    runs = [run("fedspeed", "mlp", data, settings()) for _ in range(2)]
    for name, value in runs[0].model.items():
        np.testing.assert_array_equal(runs[1].model[name], value)


def test_a_model_that_cannot_be_batched(data):
    with pytest.raises(InvalidInputError, match=r"execution: .*BatchNorm1d.*GroupNorm"):
        run(FedBN(**SHORT), "mlp-bn", data, settings(execution="batched"))
    auto = run(FedBN(**SHORT), "mlp-bn", data, settings())
    alone = run(FedBN(**SHORT), "mlp-bn", data, settings(execution="sequential"))
    for name, value in alone.model.items():
        np.testing.assert_array_equal(auto.model[name], value)
