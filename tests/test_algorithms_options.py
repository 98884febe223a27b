"""Options of the algorithms: what is refused, and what the choices between paper and code do."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from flcore.algorithms import (
    Arrival,
    Arrivals,
    Ascent,
    Client,
    FedAvg,
    FedGPS,
    FedNova,
    FedSpeed,
    Layout,
    LocalResult,
    LocalWork,
    Server,
    StepSpec,
    available,
    create,
    local_steps,
)
from flcore.errors import InvalidInputError
from toy_problem import PLAIN, Toy

MINE = (
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedcm",
    "feddyn",
    "fedgamma",
    "fedgps",
    "fednova",
    "fedprox",
    "fedsam",
    "fedsmoo",
    "fedspeed",
    "fedyogi",
    "mofedsam",
    "scaffold",
)

# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("fedprox", "mu", -0.1),
        ("fedprox", "form", "penalty"),
        ("feddyn", "prox", 0.0),
        ("fedspeed", "prox", float("nan")),
        ("fedspeed", "rho", -1.0),
        ("fedspeed", "merge", 1.5),
        ("fedspeed", "server_term", "some"),
        ("fedsam", "rho", "0.1"),
        ("fedsmoo", "rho", -0.1),
        ("mofedsam", "alpha", 0.0),
        ("fedcm", "alpha", 1.1),
        ("fednova", "mu", -1.0),
        ("fednova", "server_momentum", 1.0),
        ("fedavgm", "beta", 1.0),
        ("fedadam", "beta1", 1.0),
        ("fedadam", "beta2", -0.1),
        ("fedyogi", "tau", -1e-3),
        ("fedadagrad", "v0", "one"),
        ("fedgps", "rho", -0.5),
        ("scaffold", "option", "III"),
        ("scaffold", "weighting", "sizes"),
        ("scaffold", "local_lr", 0.0),
    ],
)
def test_bad_options_are_named(name, option, value):
    with pytest.raises(InvalidInputError, match=f"^{option}: expected .*, got"):
        create(name, **{option: value})


def test_fednova_has_no_normaliser_for_momentum_with_a_proximal_term():
    with pytest.raises(InvalidInputError, match=r"mu: expected 0 together with local_momentum=0.9"):
        FedNova(mu=0.1, local_momentum=0.9)
    with pytest.raises(InvalidInputError, match=r"mu: expected at most 1 / local_lr = 10.0"):
        FedNova(mu=11.0, local_lr=0.1)


def test_raw_ascent_has_no_adaptive_form():
    with pytest.raises(InvalidInputError, match="adaptive: expected False"):
        FedSpeed(adaptive=True, normalised=False)


def test_full_gradients_need_a_model_to_run():
    run = Toy(create("scaffold", **PLAIN, option="I"))
    client = run.client(0)
    client.tools = None
    work = run.algorithm.client_begin(run.algorithm.downlink(run.server, 0), client)
    with pytest.raises(InvalidInputError, match="option: 'I' needs the gradient"):
        run.algorithm.client_end(LocalResult(work, work.start, 1, 0.0), client)


# ---- all of them ---------------------------------------------------------------------------------


def test_all_are_listed_and_made_by_name():
    assert set(MINE) <= set(available())
    for name in MINE:
        made = create(name.upper())
        assert made.to_dict()["name"] == name == type(made).name
        assert create(**json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize("name", MINE)
def test_messages_and_states_are_arrays_and_plain_values(name):
    """Nothing else fits into a checkpoint or a network message."""
    run = Toy(create(name, **PLAIN))
    run.rounds(2)
    client = run.client(0)
    down = run.algorithm.downlink(run.server, 0)
    work = run.algorithm.client_begin(down, client)
    up = run.algorithm.client_end(LocalResult(work, work.start + 1.0, 2, 0.0), client)
    assert "model" in down and "update" in up
    for held in (down, up, run.server.state, client.state):
        for value in held.values():
            assert isinstance(value, (np.ndarray, int, float)), (name, held)


@pytest.mark.parametrize("name", MINE)
def test_float32_models_stay_float32(name):
    layout = Layout({"w": (2,)})
    server = Server(np.zeros(2, np.float32), layout, population=2, participants=2)
    algorithm = create(name, **PLAIN)
    algorithm.server_begin(server)
    states: list[dict[str, Any]] = [{}, {}]
    for round in range(3):
        server.round, arrivals = round, []
        for i, state in enumerate(states):
            client = Client(
                i, round, 3, layout, 2, 2, state, np.random.default_rng(0), np.zeros(2, np.float32)
            )
            work = algorithm.client_begin(algorithm.downlink(server, i), client)
            x = work.start[None].copy()
            local_steps(x, lambda x, k: x - np.float32([1, 2]), [work.spec], [2])
            up = algorithm.client_end(LocalResult(work, x[0], 2, 0.0), client)
            arrivals.append(Arrival(i, 3, up))
        messages = Arrivals(arrivals)
        mean = messages.mean(algorithm.weights(messages))
        algorithm.server_step(server, mean, messages)
    held = [server.model, *server.state.values(), *states[0].values(), *states[1].values()]
    for value in held:
        assert not isinstance(value, np.ndarray) or value.dtype == np.float32
    assert (server.model > 0).all()


@pytest.mark.parametrize("name", ["feddyn", "fedspeed", "fedsmoo", "fedadam", "fedavgm", "fednova"])
def test_statistics_of_the_model_are_averaged_and_no_more(name):
    """The running variance of BatchNorm must not be extrapolated or adapted."""
    layout = Layout({"w": (2,), "running_var": (2,)}, trained=2)
    assert layout.statistics == slice(2, 4)
    server = Server(np.ones(4), layout, population=4, participants=2)
    algorithm = create(name, **PLAIN)
    algorithm.server_begin(server)
    states: list[dict[str, Any]] = [{}, {}]
    for round in range(3):
        before, arrivals = server.model, []
        for i, (change, steps) in enumerate(zip((0.5, -0.1), (2, 5), strict=True)):
            client = Client(
                i, round, 3, layout, 4, 2, states[i], np.random.default_rng(0), np.ones(4)
            )
            work = algorithm.client_begin(algorithm.downlink(server, i), client)
            end = work.start + change
            up = algorithm.client_end(LocalResult(work, end, steps, 0.0), client)
            arrivals.append(Arrival(i, 3, up))
        messages = Arrivals(arrivals)
        mean = messages.mean(algorithm.weights(messages))
        algorithm.server_step(server, mean, messages)
        np.testing.assert_allclose(server.model[2:], before[2:] + mean[2:], rtol=1e-15)
    assert not np.allclose(server.model[:2], before[:2] + mean[:2])  # the rest is


def test_statistics_of_the_paper_form_of_fedspeed_too():
    layout = Layout({"w": (2,), "running_var": (2,)}, trained=2)
    algorithm = FedSpeed(**PLAIN, server_term="active")
    client = Client(
        0, 0, 3, layout, 4, 2, {"dual": np.full(4, 7.0)}, np.random.default_rng(0), np.ones(4)
    )
    work = algorithm.client_begin({"model": np.ones(4)}, client)
    up = algorithm.client_end(LocalResult(work, np.full(4, 3.0), 2, 0.0), client)
    # u is 2 and h is 7 + 2 after the round
    np.testing.assert_array_equal(up["update"], [11.0, 11.0, 2.0, 2.0])


# ---- choices -------------------------------------------------------------------------------------


def test_defaults_are_those_that_the_published_figures_come_from():
    assert (
        create("fedspeed").to_dict().items()
        >= {
            "server_term": "all",
            "normalised": True,
            "merge": 1.0,
            "rho": 0.1,
            "prox": 0.1,
            "weighting": "uniform",
        }.items()
    )
    assert create("fedadam").v0 == "tau2" and create("fedadagrad").beta1 == 0.0
    assert create("scaffold").option == "II" and create("fedgamma").rho == 0.01
    assert not create("fedavgm").damped and create("fedprox").form == "linear"
    for name in ("scaffold", "feddyn", "fedcm", "mofedsam", "fedgamma", "fedsmoo"):
        assert create(name).weighting == "uniform"


def test_a_proximal_term_outside_the_momentum_by_hand():
    x, w = np.array([[2.0]]), np.array([1.0])
    spec = StepSpec(lr=0.1, momentum=0.5, pull=2.0, anchor=w, clip=1.0, decay=0.25)
    local_steps(x, lambda x, k: np.full((1, 1), 3.0), [spec], [2])
    first = 2.0 - 0.1 * (1.0 + 0.25 * 2.0 + 2.0 * (2.0 - 1.0))
    buffer = 0.5 * (1.0 + 0.25 * 2.0) + (1.0 + 0.25 * first)
    second = first - 0.1 * (buffer + 2.0 * (first - 1.0))
    np.testing.assert_allclose(x, [[second]], rtol=1e-15)


def test_adaptive_ascent_by_hand():
    w, rho = np.array([3.0, -0.5]), 0.1
    a, seen = np.array([2.0, 1.0]), []

    def gradient(x, k):
        seen.append(x.copy())
        return a * x

    local_steps(w[None].copy(), gradient, [StepSpec(lr=1.0, shift=Ascent(rho, adaptive=True))], [1])
    g = a * w
    e = rho * w**2 * g / np.linalg.norm(abs(w) * g)
    np.testing.assert_allclose(seen[1][0], w + e, rtol=1e-6)


def test_ascent_has_the_length_rho_over_all_tensors_together():
    seen, g = [], np.array([[3.0, 4.0, 12.0]])

    def gradient(x, k):
        seen.append(x.copy())
        return g.copy()

    local_steps(np.zeros((1, 3)), gradient, [StepSpec(lr=0.1, shift=Ascent(0.26))], [1])
    np.testing.assert_allclose(seen[1] - seen[0], 0.26 * g / (13.0 + 1e-7), rtol=1e-15)


def test_path_of_several_tensors_is_shorter_than_rho():
    layout = Layout({"a": (2,), "b": (1,), "running_mean": (1,)}, trained=3)
    algorithm = FedGPS(rho=0.5)
    client = Client(
        id=0,
        round=5,
        examples=3,
        layout=layout,
        population=4,
        participants=2,
        state={"path": np.ones(4), "path_round": 2},
        rng=np.random.default_rng(0),
        initial=np.zeros(4),
    )
    path = np.array([3.0, 4.0, 12.0, 1e9])
    payload = {"model": np.zeros(4), "path": path, "senders": 2}
    shift = algorithm.client_begin(payload, client).spec.shift
    # the norms of the tensors are 5 and 12, and add up to 17; statistics do not count
    np.testing.assert_allclose(shift.vector[:3], 0.5 * path[:3] / (17 - 1e-7), rtol=1e-15)
    assert np.linalg.norm(shift.vector[:3]) < 0.5


def test_relaxed_start_moves_the_centre_of_the_penalty():
    for form in ("linear", "direct"):
        run = Toy(create("fedprox", **PLAIN, mu=1.0, relaxation=0.5, form=form))
        run.play()
        client = run.client(0)
        last = client.state["last"]
        work = run.algorithm.client_begin(run.algorithm.downlink(run.server, 0), client)
        w = run.server.model
        np.testing.assert_array_equal(work.start, w + 0.5 * (w - last))
        centre = work.spec.anchor if form == "direct" else -work.spec.q
        np.testing.assert_array_equal(centre, work.start)


def test_methods_without_other_options_take_the_plain_step():
    work = FedAvg(**PLAIN).client_begin({"model": np.ones(2)}, Toy(FedAvg(**PLAIN)).client(0))
    assert isinstance(work, LocalWork)
    assert work.spec == StepSpec(lr=0.1)
