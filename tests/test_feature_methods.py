"""Methods with a loss or a model of their own: trained together, stopped and resumed."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import flcore.simulation.engine as engine
from algorithm_problem import PLAIN, blobs, play, simulation
from flcore.algorithms import FedBN, FedGPSGoal, FedKA, FedWon, Moon
from flcore.simulation import Observer
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


class StopAfter(Observer):
    def __init__(self, rounds):
        self.left = rounds

    def round_done(self, record):
        self.left -= 1

    def should_stop(self):
        return self.left == 0


@pytest.mark.parametrize(
    ("algorithm", "model", "options"),
    [
        (Moon(buffer=2, server_momentum=0.5, **SMALL), "mlp-projection", {}),
        (FedBN(**SMALL), "mlp-bn", {}),
        (FedGPSGoal(surrogate_examples=5, surrogate_batch=6, **SMALL), "mlp", {}),
        (FedKA(**KA), "mlp", TARGET),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_stopped_run_goes_on_to_the_same_bits(tmp_path, algorithm, model, options):
    whole = simulation(algorithm, model, rounds=4, participation=2, **options)
    end = whole.run(observer=Observer()).model
    folder = tmp_path / "run"
    first = simulation(algorithm, model, rounds=4, participation=2, **options)
    first.run(output=folder, observer=StopAfter(2))
    again = simulation(algorithm, model, rounds=4, participation=2, **options)
    history = again.run(output=folder, resume=True, observer=Observer())
    assert len(history) == 4
    for name, values in end.items():
        assert np.array_equal(history.model[name], values), name
    for client, state in whole.clients.states.items():
        for name, value in state.items():
            assert np.array_equal(again.clients.states[client][name], value), name
