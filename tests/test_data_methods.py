"""Methods with data, weights or messages of their own: trained together, stopped and resumed."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import flcore.simulation.engine as engine
from algorithm_problem import PLAIN, blobs, play, simulation
from flcore.algorithms import GGEUR, Curriculum, FedAU, FedLD, FedRAM, FedRAMProxy, Staleness
from flcore.compression import EControl, TopK
from flcore.errors import InvalidInputError
from flcore.simulation import Observer
from flcore.simulation.batched import BatchedTrainer

RUNS = {
    "fedau": (FedAU(cutoff=2, selection="bernoulli", rates=(0.9, 0.5, 0.2), **PLAIN), "mlp"),
    "fedld": (FedLD(margin=0.1, **PLAIN), "mlp"),
    "fedld-bn": (FedLD(margin=0.1, reduction="sample", **PLAIN), "mlp-bn"),
    "curriculum": (Curriculum(least=2, scoring="LG", client_ordering="curr", **PLAIN), "mlp"),
    "ggeur": (GGEUR(target=10, **PLAIN), "mlp"),
    "ggeur-features": (GGEUR(target=10, space="features", **PLAIN), "mlp"),
    "fedram": (FedRAM(refresh=True, proxy_rounds=3, eta_task=1.0, **PLAIN), "mlp"),
    "fedram-proxy": (FedRAMProxy(tasks="groups", reference_epochs=2, **PLAIN), "linear"),
    "staleness": (
        Staleness(stale=(0, 2), delay=1, iterations=4, recovered=3, **PLAIN | {"batch_size": 100}),
        "mlp",
    ),
}


@pytest.mark.parametrize("name", [name for name in RUNS if name != "fedld-bn"])
def test_together_and_one_after_another_agree(monkeypatch, name):
    algorithm, model = RUNS[name]
    ends = []
    for together in (False, True):

        def choose(trainer, settings, algorithm, together=together):
            if not together:
                return trainer
            return BatchedTrainer(trainer, batch_loss=algorithm.batch_loss(), strict=True)

        monkeypatch.setattr(engine, "choose_trainer", choose)
        run = simulation(algorithm, model)
        ends.append(play(run, 4))
    moved = np.abs(ends[0][-1] - run.trainer.initial).max()
    assert moved > 0
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-5 * moved + 1e-6)


class StopAfter(Observer):
    def __init__(self, rounds):
        self.left = rounds

    def round_done(self, record):
        self.left -= 1

    def should_stop(self):
        return self.left == 0


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(name, tmp_path):
    algorithm, model = RUNS[name]
    whole = simulation(algorithm, model, rounds=5).run(observer=Observer())
    first = simulation(algorithm, model, rounds=5)
    first.run(output=tmp_path, observer=StopAfter(3))
    second = simulation(algorithm, model, rounds=5).run(
        output=tmp_path, resume=True, observer=Observer()
    )
    assert all(np.array_equal(whole.model[n], second.model[n]) for n in whole.model)
    assert [r.bytes_up for r in whole.records] == [r.bytes_up for r in second.records]


@pytest.mark.parametrize("name", ["fedld", "staleness"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "median"}, "aggregation: this algorithm makes its own aggregate"),
        ({"codec": TopK(ratio=0.5), "feedback": EControl()}, "feedback: this algorithm takes"),
    ],
)
def test_rules_that_would_not_be_followed_are_refused(name, options, message):
    algorithm, model = RUNS[name]
    with pytest.raises(InvalidInputError, match=message):
        simulation(algorithm, model, **options).step()


@pytest.mark.parametrize("name", ["fedau", "fedram"])
def test_robust_rules_and_error_control_take_the_place_of_the_mean(name):
    algorithm, model = RUNS[name]
    for options in ({"aggregation": "median"}, {"codec": TopK(ratio=0.5), "feedback": EControl()}):
        run = simulation(algorithm, model, **options)
        models = play(run, 2)
        assert np.isfinite(models[1]).all() and not np.array_equal(*models)


def test_a_round_without_anybody_is_a_round():
    algorithm = FedAU(selection="bernoulli", rates=(1e-6,) * 3, **PLAIN)
    run = simulation(algorithm, "mlp")
    models = play(run, 2)
    assert np.array_equal(models[1], run.trainer.initial)
    assert run.server["rounds"] == 2 and run.history.records[0].bytes_up == 0


def test_groups_are_tasks_where_clients_share_them():
    data = blobs()
    run = simulation(FedRAM(tasks="groups", proxy_rounds=2, **PLAIN), "mlp", data)
    play(run, 1)
    assert run.server["task_weights"] == pytest.approx(np.eye(3))
