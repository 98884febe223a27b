"""GGEUR: exact pooling of covariances, noise along the global directions, what clients fill up."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from flcore.algorithms import GGEUR, Client, Layout, Server, create
from flcore.algorithms.ggeur import (
    augment,
    class_moments,
    directions,
    from_payload,
    pool_moments,
    to_payload,
)
from flcore.errors import InvalidInputError

LAYOUT = Layout({"w": (1,)})


def make(data) -> tuple[Server, list[Client]]:
    """Clients with these pairs of examples and labels."""
    clients = [
        Client(
            id=k,
            round=0,
            examples=len(y),
            layout=LAYOUT,
            population=len(data),
            participants=len(data),
            state={},
            rng=np.random.default_rng(k),
            initial=np.zeros(1),
            tools=SimpleNamespace(x=x, y=y, features=lambda model, x=x: 10 * x.reshape(len(x), -1)),
        )
        for k, (x, y) in enumerate(data)
    ]
    return Server(np.zeros(1), LAYOUT, len(data), len(data)), clients


def normal(n: int, seed: int = 0, p: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, p)) @ rng.normal(size=(p, p)) + rng.normal(size=p)


# ---- pooling -------------------------------------------------------------------------------------


def test_pooling_by_hand():
    parts = [np.array([[0, 0], [2, 0.0]]), np.array([[0, 3], [0, 5], [3, 4.0]])]
    moments = [class_moments(x, np.zeros(len(x), int))[0] for x in parts]
    n, mean, covariance = pool_moments(moments)
    assert n == 5
    assert mean == pytest.approx([1, 2.4], abs=1e-12)
    assert covariance == pytest.approx(np.diag([1.6, 4.24]), abs=1e-12)


def test_pooling_is_exact_for_any_split():
    x = normal(57)
    moments = [class_moments(part, np.full(len(part), 7))[7] for part in np.split(x, [1, 3, 30])]
    n, mean, covariance = pool_moments(moments)
    assert n == 57
    assert np.abs(mean - x.mean(0)).max() < 1e-12
    assert np.abs(covariance - np.cov(x, rowvar=False, bias=True)).max() < 1e-12


def test_messages_hold_half_of_a_symmetric_matrix():
    x = normal(20, p=4)
    moments = class_moments(x, np.repeat([2, 5], 10))
    payload = to_payload(moments)
    assert sum(np.size(value) for value in payload.values()) == 2 * (1 + 4 + 4 * 5 // 2)
    for c, (n, mean, covariance) in from_payload(payload).items():
        assert n == 10
        assert mean == pytest.approx(moments[c][1], abs=1e-6)
        assert covariance == pytest.approx(moments[c][2], abs=1e-5)


# ---- noise ---------------------------------------------------------------------------------------


def test_noise_has_the_covariance_or_its_square():
    values, vectors = directions(np.cov(normal(40), rowvar=False, bias=True))
    covariance = (vectors * values) @ vectors.T
    x = np.tile([1.0, -2.0, 3.0], (200_000, 1))
    for scale, expected in ((np.sqrt(values), covariance), (values, covariance @ covariance)):
        made = augment(x, scale, vectors, np.random.default_rng(0))
        assert made.mean(0) == pytest.approx(x[0], abs=0.05)
        assert np.cov(made, rowvar=False) == pytest.approx(
            expected, abs=0.02 * float(expected.max())
        )


def test_without_covariance_examples_are_copied():
    values, vectors = directions(np.zeros((3, 3)))
    x = normal(5)
    assert np.array_equal(augment(x, values, vectors, np.random.default_rng(0)), x)


def test_negative_eigenvalues_are_taken_as_zero():
    values, _ = directions(np.array([[0.0, 1.0], [1.0, 0.0]]))
    assert values.tolist() == [0, 1]


# ---- what clients end up with --------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["sqrt", "lambda", "none"])
@pytest.mark.parametrize("sizes", [(30, 30), (3, 60), (1, 200)])
def test_classes_are_filled_up_and_originals_stay(noise, sizes):
    (few, many), target = sizes, 100
    x, y = normal(few + many).astype(np.float32), np.repeat([4, 2], sizes)
    server, clients = make([(x, y), (normal(10, 1), np.full(10, 2))])
    GGEUR(target=target, noise=noise).one_time_exchange(server, clients)
    made, labels = clients[0].state["x"], clients[0].state["y"]
    assert np.array_equal(made[: len(x)], x) and np.array_equal(labels[: len(y)], y)
    assert {c: int((labels == c).sum()) for c in (2, 4)} == {2: max(many, target), 4: target}
    assert set(clients[1].state["y"].tolist()) == {2}  # what it lacks stays absent
    if noise == "none":
        assert {row.tobytes() for row in made} == {row.tobytes() for row in x}


def test_duplication_is_balanced():
    x, y = np.array([[1.0], [2.0], [3.0]]), np.zeros(3, int)
    server, clients = make([(x, y)])
    GGEUR(target=3 * 51, noise="none", per_example=5).one_time_exchange(server, clients)
    # all 50 copies of the three are used
    assert np.bincount(clients[0].state["x"].ravel().astype(int)).tolist() == [0, 51, 51, 51]


def test_one_client_is_sent_its_own_covariance():
    x = normal(40)
    server, clients = make([(x, np.zeros(40, int))])
    up, down = GGEUR().one_time_exchange(server, clients)
    values, vectors = down[0]["values.0"], down[0]["directions.0"]
    expected = np.cov(x, rowvar=False, bias=True)
    assert (vectors * values) @ vectors.T == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert set(up[0]) == {"n.0", "mean.0", "half.0"}


def test_only_the_largest_clients_guide():
    data = [(normal(n, n), np.zeros(n, int)) for n in (50, 10, 35, 5)]
    server, clients = make(data)
    up, down = GGEUR(guide=0.8, target=60).one_time_exchange(server, clients)
    assert [bool(payload) for payload in up] == [True, False, True, False]
    pooled = np.cov(np.concatenate([data[0][0], data[2][0]]), rowvar=False, bias=True)
    values, vectors = down[3]["values.0"], down[3]["directions.0"]
    assert (vectors * values) @ vectors.T == pytest.approx(pooled, rel=1e-4, abs=1e-4)


def test_prototypes_of_the_other_domains():
    x = [normal(6, 0) + 100, normal(4, 1), normal(8, 2) - 100]
    labels = [np.zeros(6, int), np.zeros(4, int), np.repeat([0, 1], 4)]
    server, clients = make(list(zip(x, labels, strict=True)))
    algorithm = GGEUR(prototypes=True, target=500, own=100, per_prototype=300, noise="none")
    _, down = algorithm.one_time_exchange(server, clients)
    assert down[0]["means.0"] == pytest.approx(np.stack([x[1].mean(0), x[2][:4].mean(0)]), rel=1e-5)
    assert "means.1" not in down[2]  # nobody else has it
    made, y = clients[0].state["x"], clients[0].state["y"]
    assert (y == 0).sum() == 500
    known = np.concatenate([x[0], x[1].mean(0)[None], x[2][:4].mean(0)[None]]).astype(np.float32)
    nearest = np.abs(made[y == 0][:, None] - known).sum(2)
    assert nearest.min(1).max() < 1e-3
    # own copies are 6 * 12 of 672 candidates, of which 494 were drawn
    around = np.bincount(nearest.argmin(1), minlength=8)
    assert around[6:].min() > 180 and around[:6].sum() < 6 + 72
    assert (y == 1).sum() == 300  # a class it lacks: the other domain's prototype alone
    assert len(made) == 800


def test_features_take_the_place_of_the_examples():
    x = normal(12).reshape(12, 1, 3)
    server, clients = make([(x, np.zeros(12, int))])
    GGEUR(target=20, space="features").one_time_exchange(server, clients)
    assert clients[0].state["x"].shape == (20, 3)
    assert clients[0].state["x"][:12] == pytest.approx(10 * x[:, 0], rel=1e-6)
    server, clients = make([(x, np.zeros(12, int))])
    GGEUR(target=20).one_time_exchange(server, clients)
    assert clients[0].state["x"].shape == (20, 1, 3)


def test_mini_batches_come_from_what_was_made():
    server, clients = make([(normal(5), np.zeros(5, int))])
    algorithm = GGEUR(target=25, local_epochs=3, batch_size=10)
    algorithm.one_time_exchange(server, clients)
    view = algorithm.data_view(clients[0])
    assert view.sizes == [10, 10, 5] * 3
    assert np.array_equal(np.sort(view.order), np.repeat(np.arange(25), 3))
    assert view.x is clients[0].state["x"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0}, "target: expected a whole number from 1"),
        ({"noise": "cholesky"}, "noise: expected"),
        ({"guide": 0}, "guide: expected a number above 0 up to 1"),
        ({"space": "latent"}, "space: expected"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        create("ggeur", **options)


# ---- in the engine -------------------------------------------------------------------------------


def test_runs_on_inputs_and_on_frozen_features():
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from flcore.simulation import Settings, Simulation, run

    settings = Settings(rounds=2, clients=4, participation=4, alpha=0.5, codec=None, feedback=None)
    options = {"target": 60, "local_epochs": 1}
    history = run(GGEUR(**options), "linear", "digits", settings)
    classes_up = history.records[0].bytes_up - history.records[1].bytes_up
    assert classes_up > 10 * 4 * (64 * 65 // 2 + 64 + 1)
    simulation = Simulation(GGEUR(space="features", **options), "mlp", "digits", settings)
    body = simulation.trainer.model.features[1].weight.detach().clone()
    accuracies = [simulation.step().accuracy for _ in range(2)]
    assert simulation.trainer.layout.numel == 650
    assert simulation.trainer.model.features[1].weight.equal(body)
    assert accuracies[-1] > 0.5
