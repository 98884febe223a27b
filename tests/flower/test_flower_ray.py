"""Algorithms on Flower's simulation engine: nodes in Ray workers, the numbers of one process."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs Flower: tests/flower.sh")
pytest.importorskip("ray", reason="needs Ray: tests/flower.sh")
pytest.importorskip("torch")

from flwr.simulation import run_simulation

from flcore.algorithms import create
from flcore.bench.flower_peer import Problem, flower_rate
from flcore.integrations.flower_algorithm import client_app, server_app
from flcore.simulation import Settings, run

pytestmark = pytest.mark.slow

DIGITS_HARD = Settings(
    rounds=6,
    clients=50,
    participation=5,
    alpha=0.05,
    codec=None,
    feedback=None,
    seed=1,
    execution="sequential",  # clients under Flower train alone
)


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_equal_to_a_run_in_one_process(name):
    algorithm, histories = create(name), []
    run_simulation(
        server_app=server_app(algorithm, "mlp", "digits", DIGITS_HARD, done=histories.append),
        client_app=client_app(algorithm, "mlp", "digits", DIGITS_HARD),
        num_supernodes=DIGITS_HARD.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2, "object_store_memory": 100 * 2**20},
        },
    )
    here = run(algorithm, "mlp", "digits", DIGITS_HARD)
    (there,) = histories
    assert [record.clients for record in there] == [record.clients for record in here]
    for name, value in here.model.items():
        np.testing.assert_allclose(there.model[name], value, rtol=1e-5, atol=1e-5)
    assert abs(there.accuracy - here.accuracy) <= 1 / 360


def test_the_peer_of_the_benchmark_learns():
    rate = flower_rate(Problem(rounds=6))
    assert rate.accuracy > 0.5 and rate.rounds_per_second > 0.1
