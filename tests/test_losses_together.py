"""Methods with a loss of their own: clients trained together end as one after another."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import flcore.simulation.engine as engine
from algorithm_problem import PLAIN, blobs, play, simulation
from flcore.algorithms import FedGPSGoal, FedKA, FedWon, Moon
from flcore.simulation.batched import BatchedTrainer

SMALL = PLAIN | {"local_lr": 0.02}
IMAGES = {"data": blobs(shape=(1, 4, 4))}
TARGET = {"without": (2,), "server_examples": np.arange(24, 36)}
KA = {"rounds": 6, "batches": 4, "accumulate": 2, "vote_batches": 6, "batch_size": 8}


@pytest.mark.parametrize(
    ("algorithm", "model", "options"),
    [
        (Moon(buffer=2, **SMALL), "mlp-projection", {}),
        (FedGPSGoal(surrogate_examples=5, surrogate_batch=6, **SMALL), "mlp", {}),
        (FedKA(**KA), "mlp", TARGET),
        (FedWon(threshold=0.02, **SMALL), "cnn-bn", IMAGES),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_together_and_one_after_another_agree(monkeypatch, algorithm, model, options):
    ends = []
    for together in (False, True):

        def choose(trainer, settings, algorithm, together=together):
            if not together:
                return trainer
            return BatchedTrainer(trainer, batch_loss=algorithm.batch_loss(), strict=True)

        monkeypatch.setattr(engine, "choose_trainer", choose)
        run = simulation(algorithm, model, **options)
        ends.append(play(run, 3))
    moved = np.abs(ends[0][-1] - run.trainer.initial).max()
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-5 * moved + 1e-6)
