"""FedRAM: excesses, task weights and client weights by hand, resampling, what it reduces to."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from flcore.algorithms import (
    Arrival,
    Arrivals,
    Client,
    FedAvg,
    FedRAM,
    FedRAMProxy,
    Layout,
    LocalResult,
    Server,
    create,
)
from flcore.algorithms._softmax import SoftmaxRegression
from flcore.algorithms.fedram import resample
from flcore.algorithms.fedram_proxy import factor_loss
from flcore.errors import InvalidInputError

CLASSES, INPUTS = 3, 4
LAYOUT = Layout({"w": (INPUTS + 1, CLASSES)})
PLAIN = {"clip": None, "weight_decay": 0.0, "lr_decay": 1.0}


class Tools:
    """Softmax regression on a client's examples."""

    classes = CLASSES

    def __init__(self, x: np.ndarray, y: np.ndarray, groups: np.ndarray | None = None) -> None:
        self.x, self.y, self.groups = x, y, groups

    def losses(self, model: np.ndarray) -> np.ndarray:
        return SoftmaxRegression(self.x, self.y, CLASSES).losses(model)

    def gradient(self, model: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return SoftmaxRegression(x, y, CLASSES).gradient(model)


def make(sizes, groups: bool = False) -> tuple[Server, list[Client]]:
    """Clients with so many examples of each class (or group, with random classes)."""
    centres = 2 * np.random.default_rng(5).normal(size=(CLASSES, INPUTS))
    clients = []
    for k, counts in enumerate(sizes):
        rng = np.random.default_rng(k)
        task = np.repeat(np.arange(len(counts)), counts)
        y = rng.integers(CLASSES, size=len(task)) if groups else task
        x = centres[y] + rng.normal(size=(len(y), INPUTS))
        clients.append(
            Client(
                id=k,
                round=0,
                examples=len(y),
                layout=LAYOUT,
                population=len(sizes),
                participants=len(sizes),
                state={},
                rng=np.random.default_rng([k]),
                initial=np.zeros(LAYOUT.numel),
                tools=Tools(x, y, task if groups else None),
                indices=np.arange(100 * k, 100 * k + len(y)),
            )
        )
    return Server(np.zeros(LAYOUT.numel), LAYOUT, len(sizes), len(sizes)), clients


# ---- weights by hand -----------------------------------------------------------------------------


def test_factor_of_each_task_by_hand():
    task = np.array([0, 0, 1, 2, 2, 2])
    losses = np.array([1.0, 2.0, 1.0, 3.0, 1.0, 2.0])
    reference = np.array([3 - 0.8, 5.0, 6 - 3.0])  # sums; excesses 0.4, 0 and 1
    excess, factor = FedRAMProxy().pull(np.array([0.5, 0.3, 0.2]), losses, reference, task)
    assert excess == pytest.approx([0.4, 0, 1])
    assert factor == pytest.approx([0.499701 * 6 / 2, 0, 0.212117 * 6 / 3], abs=1e-5)


def proxy_round(algorithm: FedRAMProxy, differential, excess, sizes) -> Server:
    server, clients = make(sizes)
    algorithm.one_time_exchange(server, clients)
    arrivals = Arrivals(
        [
            Arrival(k, 1, {"update": server.zeros(), "excess": np.array(e), "differential": d})
            for k, (d, e) in enumerate(zip(differential, excess, strict=True))
        ]
    )
    algorithm.server_step(server, arrivals.mean(algorithm.weights(arrivals)), arrivals)
    return server


def test_server_step_by_hand():
    sizes = [(5, 3, 2)] * 4
    server = proxy_round(FedRAMProxy(), (0.2, -0.1, 0.5, 0.0), [(0.4, 0, 1)] * 4, sizes)
    expected = (0.251175, 0.243826, 0.258748, 0.246251)
    assert server["client_weights"] == pytest.approx(expected, abs=1e-6)
    expected = (0.499701, 0.288182, 0.212117)
    assert server["task_weights"] == pytest.approx(np.array([expected] * 4), abs=1e-6)


@pytest.mark.parametrize(
    "options", [{"eta_task": 0.0, "eta_client": 0.0}, {"smoothing": 1.0}], ids=str
)
def test_no_scaling_or_full_smoothing_freezes_both(options):
    sizes = [(5, 3, 2), (1, 0, 9)]
    server = proxy_round(FedRAMProxy(**options), (3.0, -1.0), [(2, 0, 1), (0, 0, 5)], sizes)
    assert server["client_weights"] == pytest.approx([0.5, 0.5])
    assert server["task_weights"][0] == pytest.approx(np.array([6, 3, 11]) / 20)
    assert server["task_weights"][1] == pytest.approx(np.array([6, 0, 11]) / 17)


def test_equal_excesses_and_equal_differences_change_nothing():
    server = proxy_round(FedRAMProxy(), (7.0, 7.0), [(2, 2, 2)] * 2, [(5, 3, 2), (1, 3, 6)])
    assert server["client_weights"] == pytest.approx([0.5, 0.5])
    assert server["task_weights"] == pytest.approx(np.array([[6, 6, 8]] * 2) / 20)


def test_without_smoothing_weights_grow_geometrically():
    algorithm = FedRAMProxy(smoothing=0.0, eta_client=0.3)
    server, clients = make([(2, 2, 2)] * 3)
    algorithm.one_time_exchange(server, clients)
    gains = np.array([1.0, -2.0, 0.5])
    for _ in range(5):
        arrivals = Arrivals(
            [
                Arrival(k, 6, {"update": server.zeros(), "excess": np.zeros(3), "differential": d})
                for k, d in enumerate(gains)
            ]
        )
        algorithm.server_step(server, server.zeros(), arrivals)
    expected = np.exp(0.3 * 5 * gains)
    assert server["client_weights"] == pytest.approx(expected / expected.sum())


# ---- the proxy's clients -------------------------------------------------------------------------


def participate(algorithm, server, client, end=None):
    work = algorithm.client_begin(algorithm.downlink(server, client.id), client)
    end = work.start if end is None else end
    return work, algorithm.client_end(LocalResult(work, end, 1, 0.0), client)


def test_the_reference_is_trained_once_on_the_clients_own_data():
    algorithm = FedRAMProxy(reference_epochs=30, local_lr=0.5, batch_size=100, **PLAIN)
    server, clients = make([(20, 10, 0)])
    algorithm.one_time_exchange(server, clients)
    work, sent = participate(algorithm, server, clients[0])
    reference = clients[0].state["reference"].copy()
    tools = clients[0].tools
    theta = np.zeros(LAYOUT.numel)
    for _ in range(30):
        theta -= 0.5 * tools.gradient(theta, tools.x, tools.y)
    expected = np.bincount(tools.y, tools.losses(theta), 3)
    # the exchange saw two tasks: nobody has the third
    assert reference == pytest.approx(expected[:2])
    count = np.array([20, 10])
    assert sent["excess"] == pytest.approx(np.log(3) - reference / count)
    assert sent["differential"] == 0
    assert not work.aux["factor"][:2] == pytest.approx([1, 1])
    clients[0].initial = clients[0].initial + 9
    participate(algorithm, server, clients[0])
    assert np.array_equal(clients[0].state["reference"], reference)


@pytest.mark.parametrize("baseline", ["global", "reference"])
def test_the_differential_loss_is_a_mean_difference(baseline):
    algorithm = FedRAMProxy(baseline=baseline, **PLAIN)
    server, clients = make([(6, 5, 4)])
    algorithm.one_time_exchange(server, clients)
    end = np.random.default_rng(0).normal(size=LAYOUT.numel)
    _, sent = participate(algorithm, server, clients[0], end)
    after = clients[0].tools.losses(end).mean()
    before = np.log(3) if baseline == "global" else clients[0].state["reference"].sum() / 15
    assert sent["differential"] == pytest.approx(after - before)


def test_tasks_better_than_the_reference_do_not_pull():
    algorithm = FedRAMProxy(**PLAIN)
    server, clients = make([(6, 5, 4)])
    algorithm.one_time_exchange(server, clients)
    clients[0].state["reference"] = np.full(3, 100.0)
    work, sent = participate(algorithm, server, clients[0])
    assert not work.aux["factor"].any() and not sent["excess"].any()


def test_loss_with_factors_by_hand():
    torch = pytest.importorskip("torch")
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    weight = torch.tensor([0.5, 0.5, 0.0])
    losses = -scores.log_softmax(1)[[0, 1, 2], [0, 1, 1]]
    aux = {"factor": torch.tensor([3.0, 0.5])}
    found = factor_loss(lambda x: x, scores, torch.tensor([0, 1, 1]), weight, aux)
    assert found.item() == pytest.approx((1.5 * losses[0] + 0.25 * losses[1]).item())
    both = torch.tensor([[0, 1], [1, 0], [1, 1]])  # class, task
    found = factor_loss(lambda x: x, scores, both, weight, aux)
    assert found.item() == pytest.approx((0.25 * losses[0] + 1.5 * losses[1]).item())


def test_groups_come_with_the_labels():
    algorithm = FedRAMProxy(tasks="groups", batch_size=4)
    server, clients = make([(6, 5)], groups=True)
    algorithm.one_time_exchange(server, clients)
    view = algorithm.data_view(clients[0])
    assert view.y.tolist() == np.stack([clients[0].tools.y, np.repeat([0, 1], [6, 5])], 1).tolist()
    assert sorted(view.order) == list(range(11)) and view.sizes == [4, 4, 3]


# ---- the agent -----------------------------------------------------------------------------------


def test_own_shares_give_every_example_once():
    for seed in range(20):
        task = np.sort(np.random.default_rng(seed).integers(7, size=53))
        share = np.bincount(task) / 53
        assert np.array_equal(resample(task, share, np.random.default_rng(0)), np.arange(53))


def test_tasks_are_drawn_in_their_shares():
    task = np.repeat([0, 1, 3], [10, 30, 60])
    drawn = resample(task, np.array([0.25, 0.25, 0.4, 0.1]), np.random.default_rng(0))
    # task 2 is not there: 5/12, 5/12, 2/12 of 100 are left
    assert np.bincount(task[drawn]).tolist() == [42, 42, 0, 16]
    assert np.bincount(drawn, minlength=100)[:10].tolist().count(4) == 8  # 4 passes and 2 more
    assert np.bincount(drawn, minlength=100)[40:].max() == 1


def shares(clients) -> dict:
    """Options that leave data and weights as they are."""
    counts = np.stack([np.bincount(c.tools.y, minlength=CLASSES) for c in clients])
    return {
        "task_weights": tuple(map(tuple, counts / counts.sum(1, keepdims=True))),
        "client_weights": (1.0,) * len(clients),
    }


def test_own_shares_and_uniform_weights_are_fedavg_bit_for_bit():
    server, clients = make([(9, 1, 3), (2, 8, 0), (5, 5, 5), (0, 0, 7)])
    ours = FedRAM(local_epochs=3, batch_size=4, **shares(clients), **PLAIN)
    plain = FedAvg(local_epochs=3, batch_size=4, weighting="uniform", **PLAIN)
    ours.one_time_exchange(server, clients)
    for client in clients:
        views = []
        for algorithm in (ours, plain):
            client.rng = np.random.default_rng(4)
            views.append(algorithm.data_view(client))
        assert np.array_equal(views[0].order, views[1].order)
        assert views[0].sizes == views[1].sizes
    rng = np.random.default_rng(0)
    arrivals = Arrivals(
        [
            Arrival(
                k, k, {"update": rng.normal(size=15), "weight": ours.downlink(server, k)["weight"]}
            )
            for k in range(4)
        ]
    )
    ends = []
    for algorithm in (ours, plain):
        server.model = np.zeros(15)
        mean = arrivals.mean(algorithm.weights(arrivals))
        algorithm.server_step(server, mean, arrivals)
        ends.append(server.model)
    assert np.array_equal(*ends)


def test_clients_count_by_their_weight_among_those_present():
    server, clients = make([(3, 3, 3)] * 3)
    options = shares(clients) | {"client_weights": (0.2, 0.3, 0.5)}
    algorithm = FedRAM(**options)
    algorithm.one_time_exchange(server, clients)
    ones = np.ones(15)
    arrivals = Arrivals(
        [
            Arrival(k, n, {"update": u, "weight": algorithm.downlink(server, k)["weight"]})
            for k, n, u in ((0, 1, ones), (2, 9, 8 * ones))
        ]
    )
    algorithm.server_step(server, arrivals.mean(algorithm.weights(arrivals)), arrivals)
    assert server.model == pytest.approx((0.2 + 0.5 * 8) / 0.7 * ones)


def test_client_weights_may_go_on_to_move():
    server, clients = make([(3, 3, 3)] * 3)
    algorithm = FedRAM(refresh=True, smoothing=0.0, eta_client=1.0, **shares(clients))
    algorithm.one_time_exchange(server, clients)
    work = algorithm.client_begin(algorithm.downlink(server, 0), clients[0])
    end = np.random.default_rng(1).normal(size=15)
    sent = algorithm.client_end(LocalResult(work, end, 1, 0.0), clients[0])
    gain = clients[0].tools.losses(end).mean() - np.log(3)
    assert sent["differential"] == pytest.approx(gain)
    assert sent["weight"] == pytest.approx(1 / 3)
    arrivals = Arrivals([Arrival(0, 9, sent), Arrival(2, 9, sent | {"differential": 0.0})])
    algorithm.server_step(server, server.zeros(), arrivals)
    pair = np.array([np.exp(gain), 1.0])
    expected = pair / pair.sum() * 2 / 3
    assert server["client_weights"] == pytest.approx([expected[0], 1 / 3, expected[1]])


def test_weights_are_learnt_before_the_first_round():
    server, clients = make([(40, 4, 0), (4, 40, 10), (30, 30, 2)])
    algorithm = FedRAM(proxy_rounds=8, eta_task=1.0, eta_client=1.0)
    up, down = algorithm.one_time_exchange(server, clients)
    alpha, w = server["task_weights"], server["client_weights"]
    assert alpha.sum(1) == pytest.approx(np.ones(3)) and alpha[0, 2] == 0
    assert (alpha[1] > 0).all() and w.sum() == pytest.approx(1)
    start = np.array([74, 74, 12]) / 160
    assert np.abs(alpha[1] - start).max() > 0.01 and np.ptp(w) > 0.001
    assert all(np.array_equal(c.state["alpha"], row) for c, row in zip(clients, alpha, strict=True))
    # counts, and in each round the model and the excesses of three clients; alpha in the end
    assert len(up) == 3 + 8 * 3 and len(down) == 8 * 3 + 3
    frozen = FedRAM(proxy_rounds=8, smoothing=1.0)
    frozen.one_time_exchange(server, clients)
    assert server["task_weights"][1] == pytest.approx(start)
    assert server["client_weights"] == pytest.approx([1 / 3] * 3)


def test_gradient_of_softmax_regression():
    rng = np.random.default_rng(0)
    x, y, theta = rng.normal(size=(9, 2, 2)), rng.integers(3, size=9), rng.normal(size=15)
    weights = rng.random(9)
    model = SoftmaxRegression(x, y, 3)
    found = model.gradient(theta, weights)
    for i, unit in enumerate(1e-6 * np.eye(15)):
        slope = (weights * (model.losses(theta + unit) - model.losses(theta - unit))).sum() / 2e-6
        assert found[i] == pytest.approx(slope, abs=1e-7)
    assert model.gradient(theta) == pytest.approx(model.gradient(theta, np.full(9, 1 / 9)))


# ---- errors and the engine -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fedram", {"tasks": "labels"}, "tasks: expected"),
        ("fedram", {"client_weights": (1.0,)}, "expected both, or none"),
        ("fedram-proxy", {"smoothing": 2}, "smoothing: expected a number in"),
        ("fedram-proxy", {"scope": "all"}, "scope: expected"),
        ("fedram-proxy", {"eta_task": float("nan")}, "eta_task: expected a number"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, message):
    with pytest.raises(InvalidInputError, match=message):
        create(name, **options)


def test_data_without_groups_and_weights_of_another_shape_are_refused():
    server, clients = make([(3, 3, 3)])
    clients[0].tools = SimpleNamespace(y=np.zeros(9, int), groups=None)
    with pytest.raises(InvalidInputError, match="expected data with groups"):
        FedRAM(tasks="groups").one_time_exchange(server, clients)
    server, clients = make([(3, 3, 3)])
    with pytest.raises(InvalidInputError, match=r"got shapes \(1, 2\) and \(1,\)"):
        FedRAM(task_weights=((1, 1),), client_weights=(1,)).one_time_exchange(server, clients)


@pytest.mark.parametrize("data", ["digits", "digits-domains"])
def test_both_phases_run_in_the_engine(data):
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from flcore.simulation import Settings, Simulation

    settings = Settings(rounds=2, clients=4, participation=3, alpha=0.5, codec=None, feedback=None)
    options = {"tasks": "groups" if data == "digits-domains" else "classes", "reference_epochs": 2}
    proxy = Simulation(FedRAMProxy(batch_size=40, **options), "linear", data, settings)
    losses = [proxy.step().loss for _ in range(2)]
    assert losses[1] < losses[0]
    agent = Simulation(
        FedRAM(
            task_weights=proxy.server["task_weights"],
            client_weights=proxy.server["client_weights"],
            local_epochs=1,
            **options,
        ),
        "mlp",
        data,
        settings,
    )
    assert agent.step().accuracy > 0.1
    assert np.isfinite(Simulation(FedRAM(proxy_rounds=2), "mlp", data, settings).step().loss)
