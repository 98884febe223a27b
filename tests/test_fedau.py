"""FedAU: weights from intervals, rounds with and without participants, what it reduces to."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flcore.algorithms import Arrival, Arrivals, FedAU, FedAvg, Layout, Server, create
from flcore.errors import InvalidInputError
from toy_problem import PLAIN, Toy


def start(algorithm: FedAU, clients: int, size: int = 1) -> Server:
    server = Server(np.zeros(size), Layout({"w": (size,)}), clients, max(1, clients // 10))
    algorithm.server_begin(server)
    return server


def play(algorithm: FedAU, server: Server, updates: dict[int, np.ndarray]) -> np.ndarray:
    """Do one round in which the clients send these."""
    arrivals = Arrivals(
        [
            Arrival(n, 1, {"update": u, "weight": algorithm.downlink(server, n)["weight"]})
            for n, u in updates.items()
        ]
    )
    mean = arrivals.mean(algorithm.weights(arrivals)) if updates else server.zeros()
    algorithm.server_step(server, mean, arrivals)
    server.round += 1
    return server.model


TRACE = [0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("cutoff", "expected"),
    [(3, [1, 3, 7 / 3, 2.5]), (None, [1, 3, 2, 10 / 3]), (1, [1, 1, 1, 1])],
)
def test_an_update_counts_by_the_weight_in_force_and_by_all_clients(cutoff, expected):
    algorithm = FedAU(cutoff=cutoff)
    server = start(algorithm, clients=4)
    moved = []
    for present in TRACE:
        before = server.model.copy()
        after = play(algorithm, server, {2: np.ones(1)} if present else {})
        if present:
            moved.append(4 * (after - before).item())
        else:
            assert np.array_equal(after, before)
    assert moved == pytest.approx(expected, abs=1e-12)


def test_full_participation_is_fedavg_with_uniform_weights_bit_for_bit():
    ours, plain = (Toy(cls(server_lr=0.7, weighting="uniform", **PLAIN)) for cls in (FedAU, FedAvg))
    for _ in range(20):
        assert np.array_equal(ours.play(), plain.play())


def test_without_an_estimate_it_is_fedavg_at_any_participation():
    ours, plain = Toy(FedAU(estimate="none", **PLAIN)), Toy(FedAvg(weighting="uniform", **PLAIN))
    for active in ([0], [0, 1], [1], [1], [0, 1]):
        assert np.array_equal(ours.play(active), plain.play(active))


def test_intervals_and_what_is_open_add_up_to_the_rounds():
    algorithm = FedAU(cutoff=5)
    server, rng = start(algorithm, 20), np.random.default_rng(0)
    for t in range(1, 60):
        present = np.flatnonzero(rng.random(20) < 0.2)
        play(algorithm, server, {int(n): np.zeros(1) for n in present})
        assert server["rounds"] == t
        assert (server["closed"] <= t).all() and (t - server["closed"] < 5).all()


def test_a_client_that_comes_once_a_period_weighs_the_period():
    algorithm = FedAU()
    server = start(algorithm, 4)
    for t in range(400):
        play(algorithm, server, {t % 4: np.zeros(1)})
    omega = server["closed"] / server["intervals"]
    assert omega.tolist() == pytest.approx([4, 4, 4, 4], rel=0.01)


def test_state_can_be_written_to_a_file_and_goes_on_bit_for_bit():
    algorithm, rng = FedAU(cutoff=7), np.random.default_rng(1)
    server = start(algorithm, 5, size=3)
    rounds = [{n: rng.normal(size=3) for n in range(5) if rng.random() < 0.3} for _ in range(30)]
    for updates in rounds[:15]:
        play(algorithm, server, updates)
    plain = {k: v for k, v in server.state.items() if not isinstance(v, np.ndarray)}
    state = server.state | json.loads(json.dumps(plain))
    other = Server(server.model.copy(), server.layout, 5, 1, state=dict(state), round=15)
    for updates in rounds[15:]:
        assert np.array_equal(play(algorithm, server, updates), play(algorithm, other, updates))


def test_rates_are_what_clients_come_at():
    rates = (1.0, 0.5, 0.1)
    algorithm = FedAU(selection="bernoulli", rates=rates)
    server, rng = start(algorithm, 3), np.random.default_rng(0)
    drawn = [algorithm.select(server, rng) for _ in range(4000)]
    seen = np.bincount(np.concatenate(drawn).astype(int), minlength=3) / 4000
    assert seen == pytest.approx(rates, abs=0.03)
    nobody = FedAU(selection="bernoulli", rates=(1e-9, 1e-9))
    assert nobody.select(start(nobody, 2), rng) == []


def test_known_rates_weigh_by_their_inverse():
    algorithm = FedAU(selection="bernoulli", rates=(0.5, 0.1), estimate="known")
    server = start(algorithm, 2)
    assert play(algorithm, server, {0: np.ones(1), 1: np.ones(1)}) == pytest.approx([6.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoff": 0}, "cutoff: expected a whole number from 1"),
        ({"estimate": "mean"}, "estimate: expected"),
        ({"estimate": "known"}, "rates: expected the rate of each client"),
        ({"rates": (0.5, 0.0), "selection": "bernoulli"}, "rates: expected numbers above 0"),
        ({"rates": (0.5,)}, 'selection="bernoulli"'),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        create("fedau", **options)


def test_rates_for_another_population_are_refused():
    with pytest.raises(InvalidInputError, match="one for each of 3 clients, got 2"):
        start(FedAU(selection="bernoulli", rates=(0.5, 0.5)), 3)


# ---- skewed participation ------------------------------------------------------------------------


def distance(**options) -> float:
    """Distance of the tail average to the optimum of ``mean of 1/2 ||x - c_n||^2``, 50 clients."""
    rates = np.geomspace(0.02, 1.0, 50)
    rng = np.random.default_rng(3)
    centres = 4 * np.linspace(-1, 1, 50)[:, None] + rng.normal(size=(50, 5))
    algorithm = FedAU(selection="bernoulli", rates=tuple(rates), **options)
    server, draws = start(algorithm, 50, size=5), np.random.default_rng(0)
    tail = np.zeros(5)
    for t in range(2000):
        present = algorithm.select(server, draws)
        play(algorithm, server, {n: 0.05 * (centres[n] - server.model) for n in present})
        tail += server.model * (t >= 1000) / 1000
    return float(np.linalg.norm(tail - centres.mean(0)))


@pytest.mark.slow
def test_intervals_remove_the_bias_to_frequent_clients():
    # the published ordering, with the same population for all
    found = {
        name: distance(**options)
        for name, options in {
            "intervals": {},
            "cut at 50": {"cutoff": 50},
            "cut at 10": {"cutoff": 10},
            "average of all": {"cutoff": 1},
            "average of participants": {"estimate": "none"},
            "known rates": {"estimate": "known"},
        }.items()
    }
    assert found["intervals"] < found["cut at 50"] < found["cut at 10"] - 0.5
    assert found["cut at 10"] < min(found["average of all"], found["average of participants"]) - 0.5
    assert found["known rates"] < 0.3
