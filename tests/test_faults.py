"""Clients that do not answer, do less, or have wrong labels; and runs that stop in between."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flcore.algorithms import create
from flcore.errors import InvalidInputError
from flcore.simulation import DivergedError, Observer, Settings, run
from flcore.simulation.datasets import Dataset, load_dataset
from flcore.simulation.engine import Simulation

PLAIN = {"codec": None, "feedback": None}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


class StopAfter(Observer):
    def __init__(self, rounds):
        self.rounds = rounds

    def round_done(self, record):
        self.rounds -= 1

    def should_stop(self):
        return self.rounds == 0


def test_some_clients_do_not_answer(digits):
    settings = Settings(rounds=30, clients=20, participation=10, dropout=0.4, **PLAIN)
    history = run(create("fedavg", local_epochs=1), "mlp", digits, settings)
    counts = [len(record.clients) for record in history]
    assert 0.45 < np.mean(counts) / 10 < 0.75 and len(set(counts)) > 3
    assert all(r.bytes_up == 4 * 4810 * len(r.clients) for r in history)


def test_a_round_in_which_nobody_answers_changes_nothing(digits):
    settings = Settings(clients=20, participation=1, dropout=0.9, **PLAIN)
    simulation = Simulation("fedavg", "mlp", digits, settings)
    empty = 0
    for _ in range(10):
        before = simulation.server.model.copy()
        record = simulation.step()
        if not record.clients:
            np.testing.assert_array_equal(simulation.server.model, before)
            empty += 1
            assert (record.bytes_up, record.bytes_down) == (0, 0)
    assert empty > 3


def test_stragglers_do_a_part_of_their_steps(digits):
    settings = Settings(clients=10, participation=10, stragglers=0.5, alpha=None, **PLAIN)
    simulation = Simulation(create("scaffold", local_epochs=2), "mlp", digits, settings)
    sizes = []
    slowed = simulation.clients.slowed

    def noted(view, client, round):
        out = slowed(view, client, round)
        sizes.append((len(out.sizes), len(view.sizes)))
        return out

    simulation.clients.slowed = noted
    for _ in range(4):
        simulation.step()
    assert all(1 <= done <= whole == 30 for done, whole in sizes)
    fewer = sum(done < whole for done, whole in sizes) / len(sizes)
    assert 0.25 < fewer < 0.75
    # the conservation law holds with different numbers of steps, too
    mean = np.mean([state["control"] for state in simulation.clients.states.values()], axis=0)
    np.testing.assert_allclose(simulation.server["control"], mean, atol=1e-5)


def test_wrong_labels_are_as_many_as_asked_for(digits):
    simulation = Simulation("fedavg", "mlp", digits, Settings(label_noise=0.3, **PLAIN))
    wrong = simulation.trainer.y.numpy() != digits.y_train
    assert abs(wrong.mean() - 0.3) < 0.04
    np.testing.assert_array_equal(simulation._test[1].numpy(), digits.y_test)


@pytest.mark.parametrize(
    ("name", "kept"), [("scaffold", 1), ("feddyn", 1), ("fedsmoo", 2), ("fedadam", 0), ("fedcm", 0)]
)
def test_a_run_killed_at_any_round_resumes_to_the_same_bits(name, kept, digits, tmp_path):
    faults = {"dropout": 0.2, "stragglers": 0.3}
    settings = Settings(
        rounds=5, clients=10, participation=4, checkpoint_every=1, **faults, **PLAIN
    )
    algorithm = create(name, local_epochs=1)
    straight = run(algorithm, "mlp", digits, settings, output=tmp_path / "straight")
    for killed in (1, 3, 4):
        folder = tmp_path / f"{killed}"
        run(algorithm, "mlp", digits, settings, output=folder, observer=StopAfter(killed))
        resumed = run(algorithm, "mlp", digits, settings, output=folder, resume=True)
        for part in straight.model:
            np.testing.assert_array_equal(resumed.model[part], straight.model[part])
        for file in ("model.safetensors", "checkpoint.safetensors"):
            a, b = ((tmp_path / "straight" / file).read_bytes(), (folder / file).read_bytes())
            assert a == b or file != "model.safetensors"
    simulation = Simulation(algorithm, "mlp", digits, settings)
    simulation.step()
    seen = [simulation.clients.states[client] for client in simulation.history[0].clients]
    assert [sum(np.ndim(v) == 1 for v in state.values()) for state in seen] == [kept] * len(seen)


def test_state_is_in_the_checkpoint_by_name(digits, tmp_path):
    from safetensors import safe_open

    settings = Settings(rounds=1, clients=4, participation=2, **PLAIN)
    run(create("scaffold", local_epochs=1), "mlp", digits, settings, output=tmp_path)
    with safe_open(tmp_path / "checkpoint.safetensors", framework="numpy") as stored:
        names = set(stored.keys())
        facts = json.loads(stored.metadata()["flcore"])
    assert "server/control" in names and facts["round"] == 1
    assert sum(name.startswith("own/") and name.endswith("/control") for name in names) == 2


def test_bytes_of_further_arrays_are_counted(digits):
    settings = Settings(rounds=2, clients=10, participation=4, **PLAIN)
    plain = run(create("fedavg", local_epochs=1), "mlp", digits, settings)
    control = run(create("scaffold", local_epochs=1), "mlp", digits, settings)
    vectors = 2 * 4 * 4 * 4810
    assert plain.bytes_up == plain.bytes_down == vectors
    # down: the control vector with its name; up: the number of steps with its name
    assert 2 * vectors < control.bytes_down < 2 * vectors + 2 * 4 * 120
    assert vectors < control.bytes_up < vectors + 2 * 4 * 120


def test_a_diverging_run_says_which_client(digits):
    settings = Settings(rounds=5, clients=5, participation=5, **PLAIN)
    algorithm = create("fedavg", local_lr=1e30, clip=None)
    with pytest.raises(DivergedError, match="the loss of client 0 in round 1 is not finite; lower"):
        run(algorithm, "mlp", digits, settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, "dropout: expected a share from 0 to below 1, got 1.0"),
        ({"stragglers": -0.1}, "stragglers: expected a share"),
        ({"label_noise": "much"}, "label_noise: expected a share"),
        ({"participation": 60}, "participation: 60 clients a round, but there are only 50"),
        ({"execution": "parallel"}, "execution: expected one of auto, batched, sequential"),
        ({"partition": "zipf:2"}, "partition"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(InvalidInputError, match=message):
        Settings(**PLAIN, **options)


def test_options_of_another_algorithm_are_named():
    with pytest.raises(InvalidInputError, match="rho: fedavg has no such option; it has: batch_"):
        create("fedavg", rho=0.1)


def test_sums_under_econtrol_are_refused(digits):
    # clients that do different numbers of steps: the server needs more than the mean
    settings = Settings(clients=8, participation=8, stragglers=0.5)
    simulation = Simulation("scaffold", "mlp", digits, settings)
    with pytest.raises(InvalidInputError, match="feedback: this algorithm takes sums of the upd"):
        simulation.step()


def test_own_models_need_test_examples_like_their_own(digits):
    few = digits.y_test != 3
    data = Dataset("few", digits.x_train, digits.y_train, digits.x_test[few], digits.y_test[few])
    partition = [np.flatnonzero(digits.y_train == c) for c in (2, 3)]
    settings = Settings(rounds=1, clients=2, participation=2, **PLAIN)
    with pytest.raises(InvalidInputError, match=r"y_test: .* of the classes of client 1, whose"):
        run(create("fedbn", local_epochs=1), "mlp-bn", data, settings, partition=partition)
