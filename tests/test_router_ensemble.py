"""Experts that never met, behind a router: the identity by numbers, and one-shot training."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from flcore.aggregation import TrimmedMean
from flcore.algorithms import FedAvg, RouterEnsemble
from flcore.algorithms.ddome import expert
from flcore.errors import InvalidInputError
from flcore.simulation import Dataset, Observer, Settings, Simulation, load_dataset, run
from flcore.simulation.attacks import SignFlip

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from flcore.nn import ExpertMixture, routing_weights

X = np.array([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
MIXED = [
    -0.4000046335,
    0.7998338711,
    1.9822580032,
    0.1584342068,
    -2.9914512649,
    -2.9999966633,
    -2.9999999996,
]
PARTS = ((-2.0, 0.5, 0.3), (3.0, 1.0, 0.7))  # mean, deviation, frequency
T = 0.5
SETTINGS = Settings(rounds=3, clients=5, participation=3, codec=None, feedback=None)
QUICK = {"expert_epochs": 2, "local_epochs": 1}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


def by_pairs(digits: Dataset) -> list[np.ndarray]:
    """Give every client the examples of two digits."""
    return [np.flatnonzero(digits.y_train // 2 == k) for k in range(5)]


# ---- weights and the identity --------------------------------------------------------------------


def gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give density and velocity of each part at x_t = (1 - t) x_0 + t eps, velocity eps - x_0."""
    densities, velocities = [], []
    for mean, deviation, frequency in PARTS:
        spread = (1 - T) ** 2 * deviation**2 + T**2
        gap = x - (1 - T) * mean
        densities.append(frequency * np.exp(-(gap**2) / (2 * spread)) / math.sqrt(spread))
        velocities.append((T - (1 - T) * deviation**2) * gap / spread - mean)
    return np.stack(densities, 1), np.stack(velocities, 1)


def test_velocity_of_a_mixture_is_the_routers_mean_of_its_parts():
    densities, velocities = gaussian(X)
    router = torch.from_numpy(densities / densities.sum(1, keepdims=True))
    weights = routing_weights(router, "full").numpy()
    np.testing.assert_allclose((weights * velocities).sum(1), MIXED, atol=1e-10, rtol=0)
    np.testing.assert_allclose(weights[3], [0.5094248721, 0.4905751279], atol=1e-10)


def test_velocity_by_integration_over_what_was_there_before_the_noise():
    """E[eps - x_0 | x_t = x], with eps = (x - (1 - t) x_0) / t, on a grid of x_0."""
    x0 = np.linspace(-8, 12, 20001)
    prior = sum(f * np.exp(-(((x0 - m) / s) ** 2) / 2) / s for m, s, f in PARTS)
    for x, expected in zip(X, MIXED, strict=True):
        eps = (x - (1 - T) * x0) / T
        density = prior * np.exp(-(eps**2) / 2)
        velocity = (density * (eps - x0)).sum() / density.sum()
        assert velocity == pytest.approx(expected, abs=1e-9)


P = torch.tensor([[0.5, 0.1, 0.4], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("routing", "options", "expected"),
    [
        ("full", {}, P.tolist()),
        ("top", {}, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ("top", {"kept": 2}, [[5 / 9, 0, 4 / 9], [2 / 9, 7 / 9, 0], [3 / 7, 0, 4 / 7]]),
        ("top", {"kept": 3}, P.tolist()),
        ("nucleus", {"mass": 0.6}, [[5 / 9, 0, 4 / 9], [0, 1, 0], [3 / 7, 0, 4 / 7]]),
        ("nucleus", {"mass": 0.05}, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ("nucleus", {"mass": 1.0}, P.tolist()),
    ],
)
def test_routing_weights_by_hand(routing, options, expected):
    weights = routing_weights(P, routing, **options)
    np.testing.assert_allclose(weights, expected, atol=1e-12)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)


def test_one_expert_is_drawn_by_its_probability():
    generator = torch.Generator().manual_seed(0)
    weights = routing_weights(P[:1].expand(20_000, -1), "sample", generator=generator)
    assert ((weights == 0) | (weights == 1)).all() and (weights.sum(1) == 1).all()
    np.testing.assert_allclose(weights.mean(0), P[0], atol=0.015)


@pytest.mark.parametrize("routing", ["full", "top", "nucleus", "sample"])
def test_one_expert_and_equal_experts_do_not_need_the_router(routing):
    torch.manual_seed(0)
    single, x = torch.nn.Linear(4, 3), torch.randn(6, 4)
    expected = single(x).log_softmax(1).detach()
    for count in (1, 3):
        model = ExpertMixture([single] * count, torch.nn.Linear(4, count), routing=routing)
        np.testing.assert_allclose(model(x).detach(), expected, atol=1e-6)


def test_class_probabilities_are_the_routers_mean_of_the_experts():
    torch.manual_seed(0)
    experts, router = [torch.nn.Linear(4, 3) for _ in range(2)], torch.nn.Linear(4, 2)
    x = torch.randn(6, 4)
    found = ExpertMixture(experts, router, routing="full")(x).exp().detach()
    r, p = router(x).softmax(1), torch.stack([expert(x).softmax(1) for expert in experts], 1)
    np.testing.assert_allclose(found, (r[:, :, None] * p).sum(1).detach(), rtol=1e-5)


def test_absent_experts_do_not_speak():
    torch.manual_seed(0)
    experts, router = [torch.nn.Linear(4, 3) for _ in range(3)], torch.nn.Linear(4, 3)
    model, x = ExpertMixture(experts, router, routing="full"), torch.randn(6, 4)
    model.chosen.data = torch.tensor([0.0, 1.0, 0.0])
    np.testing.assert_allclose(model(x).detach(), experts[1](x).log_softmax(1).detach(), atol=1e-6)


def test_routing_that_there_is_not_is_refused():
    with pytest.raises(InvalidInputError, match="routing: expected one of full, top"):
        routing_weights(P, "best")
    with pytest.raises(InvalidInputError, match="kept: expected a number of experts from 1 to 3"):
        routing_weights(P, "top", kept=4)
    with pytest.raises(InvalidInputError, match="mass: expected a number above 0 up to 1"):
        routing_weights(P, "nucleus", mass=0.0)


# ---- one-shot training ---------------------------------------------------------------------------


def test_experts_are_trained_alone_and_sent_once(digits):
    run_ = Simulation(
        RouterEnsemble(**QUICK), "mlp:8", digits, SETTINGS, partition=by_pairs(digits)
    )
    layout, start = run_.layout, run_.server.model.copy()
    first = run_.step()
    assert first.clients == (0, 1, 2, 3, 4) and first.bytes_down == 0
    size = expert(layout, 0).size()
    assert 0 <= first.bytes_up - 5 * 4 * size < 5 * 100
    assert np.array_equal(layout.take(run_.server.model), layout.take(start))
    for k in range(5):
        mine = expert(layout, k)
        assert not np.array_equal(mine.take(run_.server.model), mine.take(start))
    trained = run_.server.model.copy()
    second = run_.step()
    assert len(second.clients) == 3
    assert second.bytes_up == second.bytes_down == 3 * 4 * layout.size()
    for k in range(5):
        mine = expert(layout, k)
        assert np.array_equal(mine.take(run_.server.model), mine.take(trained))
    assert not np.array_equal(layout.take(run_.server.model), layout.take(start))


def test_an_expert_is_what_its_client_would_train_alone(digits):
    """The same numbers as local SGD on the client's part, whoever else there is."""
    partition = by_pairs(digits)
    run_ = Simulation(RouterEnsemble(**QUICK), "mlp:8", digits, SETTINGS, partition=partition)
    run_.step()
    mine = expert(run_.layout, 0)
    alone = Settings(rounds=1, clients=1, participation=1, codec=None, feedback=None)
    plain = run(FedAvg(local_epochs=2), "mlp:8", digits, alone, partition=partition[:1])
    for name, value in plain.model.items():
        found = mine.named(run_.server.model)[f"experts.0.{name}"]
        np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-5)


def test_clients_trained_together_end_where_they_do_one_after_another(digits):
    runs = [
        run(
            RouterEnsemble(**QUICK),
            "mlp:8",
            digits,
            replace(SETTINGS, execution=execution),
            partition=by_pairs(digits),
        )
        for execution in ("sequential", "batched")
    ]
    for name, value in runs[0].model.items():
        np.testing.assert_allclose(runs[1].model[name], value, rtol=1e-5, atol=1e-6)


def test_a_rule_and_an_attack_are_for_the_router_and_not_for_experts(digits):
    """Messages without an update, those of the first round, reach the server as they are."""
    runs = [
        run(
            RouterEnsemble(**QUICK),
            "mlp:8",
            digits,
            replace(SETTINGS, rounds=2, participation=5, **options),
            partition=by_pairs(digits),
        )
        for options in ({}, {"attack": SignFlip(), "attackers": 1, "aggregation": TrimmedMean(1)})
    ]
    for name, value in runs[0].model.items():
        same = np.array_equal(value, runs[1].model[name])
        assert same == (not name.startswith("router."))


def test_compressed_rounds_and_a_stop_in_between_give_the_same_run(digits, tmp_path):
    class Stop(Observer):
        def should_stop(self) -> bool:
            return True

    args = (RouterEnsemble(**QUICK), "mlp:8", digits, Settings(rounds=3, clients=5))
    whole = run(*args, partition=by_pairs(digits))
    run(*args, partition=by_pairs(digits), output=tmp_path / "run", observer=Stop())
    resumed = run(*args, partition=by_pairs(digits), output=tmp_path / "run", resume=True)
    assert [r.accuracy for r in resumed] == [r.accuracy for r in whole]
    assert resumed[1].bytes_up < resumed[1].bytes_down / 3
    for name, value in whole.model.items():
        assert np.array_equal(resumed.model[name], value)


@pytest.mark.slow
def test_routed_experts_are_far_above_the_mean_of_their_parameters(digits):
    """Five pairs of digits: see the page of reproductions for the table."""
    settings = Settings(rounds=21, clients=5, participation=5, codec=None, feedback=None)
    run_ = Simulation(
        RouterEnsemble(expert_epochs=10, local_epochs=1),
        "mlp",
        digits,
        settings,
        partition=by_pairs(digits),
    )
    history = run_.run(observer=Observer())
    experts = [expert(run_.layout, k).take(run_.server.model) for k in range(5)]
    mean = run_.server.model
    for k in range(5):
        mean = expert(run_.layout, k).put(mean, np.mean(experts, axis=0))
    averaged, _ = run_.trainer.evaluate(mean, *run_._test)
    once = Settings(rounds=1, clients=5, participation=5, codec=None, feedback=None)
    same_start = run(FedAvg(), "mlp", digits, once, partition=by_pairs(digits))
    assert history.accuracy > 0.88
    assert history.accuracy > averaged + 0.3
    assert history.accuracy > same_start.accuracy + 0.1


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": 0}, "parts: expected a whole number from 1, got 0"),
        ({"kept": 6}, "kept: expected at most parts=5, got 6"),
        ({"mass": 0.0}, "mass: expected a number above 0 up to 1"),
        ({"routing": "best"}, "routing: expected"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        RouterEnsemble(**options)


def test_clients_are_the_parts(digits):
    settings = Settings(rounds=1, clients=6, participation=5)
    with pytest.raises(InvalidInputError, match="parts: expected as many as clients, 6, got 5"):
        Simulation(RouterEnsemble(), "mlp", digits, settings)
