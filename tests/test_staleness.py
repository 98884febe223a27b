"""Late updates: when they arrive, what takes their place, and data found by inversion."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from flcore.algorithms import Arrival, Arrivals, Layout, Server, Staleness, create
from flcore.algorithms import staleness as module
from flcore.algorithms._inversion import LocalTraining, Recovered, invert
from flcore.algorithms.staleness import is_unique
from flcore.errors import InvalidInputError

torch = pytest.importorskip("torch")

INPUTS, HIDDEN, CLASSES = 5, 4, 3
LAYOUT = Layout({"a": (HIDDEN, INPUTS), "b": (CLASSES, HIDDEN)})
PLAIN = {"clip": None, "weight_decay": 0.0, "lr_decay": 1.0, "weighting": "uniform"}


def forward(x, parameters):
    """A small network without biases."""
    a = parameters[: HIDDEN * INPUTS].view(HIDDEN, INPUTS)
    b = parameters[HIDDEN * INPUTS :].view(CLASSES, HIDDEN)
    return torch.tanh(x @ a.T) @ b.T


TOOLS = SimpleNamespace(forward=forward, example_shape=(INPUTS,), classes=CLASSES)


def draw(seed: int, n: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, INPUTS)), rng.integers(CLASSES, size=n)


def trained(w, x, y, steps=3, lr=0.2, decay=0.0, momentum=0.0, clip=None) -> np.ndarray:
    """What torch's own SGD on hard labels changes."""
    v = torch.tensor(w, requires_grad=True)
    sgd = torch.optim.SGD([v], lr, momentum=momentum, weight_decay=decay)
    for _ in range(steps):
        sgd.zero_grad()
        loss = torch.nn.functional.cross_entropy(forward(torch.tensor(x), v), torch.tensor(y))
        loss.backward()
        if clip is not None:
            v.grad *= clip / max(clip, v.grad.norm().item())
        sgd.step()
    return v.detach().numpy() - w


def truth(x, y) -> Recovered:
    """The client's own data; logits so far apart that the soft labels are hard."""
    return Recovered(np.float32(x), np.float32(1e4 * np.eye(CLASSES)[y]), 0.0)


def start(algorithm: Staleness, population: int = 3, size: int | None = None) -> Server:
    model = np.random.default_rng(9).normal(size=LAYOUT.numel)
    layout = LAYOUT
    if size is not None:
        model, layout = np.zeros(size), Layout({"w": (size,)})
    server = Server(model, layout, population, population, tools=TOOLS)
    algorithm.server_begin(server)
    return server


def play(algorithm: Staleness, server: Server, updates: dict[int, np.ndarray]) -> np.ndarray:
    arrivals = Arrivals([Arrival(i, 1, {"update": u, "steps": 3}) for i, u in updates.items()])
    mean = arrivals.mean(algorithm.weights(arrivals)) if updates else server.zeros()
    algorithm.server_step(server, mean, arrivals)
    server.round += 1
    return server.model.copy()


# ---- when updates arrive -------------------------------------------------------------------------


def test_late_updates_are_averaged_delay_rounds_later():
    algorithm = Staleness(stale=(1,), delay=2, correction="direct", **PLAIN)
    server = start(algorithm, population=2, size=1)
    ones = np.ones(1)
    models = [play(algorithm, server, {0: ones * 10**t, 1: ones * 2 * 10**t}) for t in range(4)]
    # rounds 2 and 3: means of 100 and 2, of 1000 and 20
    assert np.ravel(models).tolist() == [1, 11, 11 + 51, 62 + 510]
    assert sorted(n for n in server.state if "." in n) == [
        "model.2",
        "model.3",
        "update.2.1",
        "update.3.1",
    ]


def test_what_is_late_arrives_in_a_round_without_anybody_else():
    algorithm = Staleness(stale=(0,), delay=1, correction="direct", **PLAIN)
    server = start(algorithm, population=2, size=1)
    assert [play(algorithm, server, u).item() for u in ({0: np.ones(1)}, {}, {})] == [0, 1, 1]


def test_twenty_rounds_late_weigh_half():
    algorithm = Staleness(stale=(0,), delay=20, correction="weighted", **PLAIN)
    server = start(algorithm, population=1, size=1)
    moved = [play(algorithm, server, {0: np.full(1, 8.0)} if t == 0 else {}) for t in range(21)]
    assert np.ravel(moved).tolist() == [0] * 20 + [4]


def test_first_order_correction_by_hand():
    algorithm = Staleness(stale=(0,), delay=1, correction="first-order", **PLAIN)
    server = start(algorithm, population=2, size=2)
    play(algorithm, server, {0: np.array([0.5, -1.0]), 1: np.array([2.0, 1.0])})
    moved = play(algorithm, server, {})
    # u - 4 u u (w - w_old), with w - w_old = (2, 1)
    assert moved == pytest.approx([2 + 0.5 - 4 * 0.25 * 2, 1 - 1 - 4 * 1 * 1])


# ---- local training, differentiable --------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"decay": 0.1}, {"momentum": 0.5}, {"clip": 0.05, "decay": 0.0}]
)
def test_the_clients_data_give_its_update_from_any_model(options):
    x, y = draw(0)
    x = x.astype(np.float32).astype(np.float64)
    for seed in range(3):
        w = np.random.default_rng(seed).normal(size=LAYOUT.numel)
        training = LocalTraining(forward, steps=3, lr=0.2, **options)
        made = truth(x, y).update(training, w)
        assert np.abs(made - trained(w, x, y, **options)).max() < 1e-12


def test_the_authors_loss_takes_raw_labels():
    x, _ = draw(0)
    labels = np.random.default_rng(1).normal(size=(8, CLASSES))
    w = torch.tensor(np.random.default_rng(2).normal(size=LAYOUT.numel), requires_grad=True)
    scores = forward(torch.tensor(x), w)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, torch.tensor(labels))
    (g,) = torch.autograd.grad(loss, w)
    training = LocalTraining(forward, steps=1, lr=0.5, targets="sigmoid")
    made = training.update(w.detach(), torch.tensor(x), torch.tensor(labels))
    assert torch.allclose(made, -0.5 * g, atol=1e-12)


# ---- inversion -----------------------------------------------------------------------------------


def problem(seed: int = 0):
    x, y = draw(seed)
    w = np.random.default_rng(seed + 5).normal(size=LAYOUT.numel)
    first = Recovered(*(np.float32(v) for v in (draw(77, 4)[0], np.zeros((4, CLASSES)))), np.inf)
    return LocalTraining(forward, steps=3, lr=0.2), w, trained(w, x, y), first


def test_inversion_finds_data_that_make_the_update():
    training, w, u, first = problem()
    found = invert(training, w, u, first, iterations=300, lr=0.1)
    assert found.distance < 0.1 * np.abs(u - first.update(training, w)).sum()
    assert found.distance == pytest.approx(np.abs(found.update(training, w) - u).sum(), rel=1e-3)


def test_the_mask_keeps_the_largest_coordinates():
    training, w, u, first = problem()
    found = invert(training, w, u, first, iterations=20, lr=0.1, kept=0.25)
    largest = np.argsort(-np.abs(u))[:8]  # of 32
    off = np.abs(found.update(training, w) - u)
    assert found.distance == pytest.approx(off[largest].sum(), rel=1e-3)


def test_inputs_stay_in_their_box():
    training, w, u, first = problem()
    found = invert(training, w, u, first, iterations=10, lr=1.0, box=(-0.5, 0.25))
    assert found.x.min() == -0.5 and found.x.max() == 0.25


def test_the_learning_rate_falls_three_times():
    training, w, u, first = problem()
    first.x[:] = 0
    # one step of Adam on signs moves by the learning rate: 3 + 2 * 0.1 + 2 * 0.01 + 1 * 0.001
    found = invert(training, w, u, first, iterations=8, lr=1.0)
    assert np.abs(found.x).max() <= 3.221 + 1e-6


# ---- the server ----------------------------------------------------------------------------------


def with_truth(monkeypatch, data) -> list:
    calls: list = []

    def found(training, old, u, first, **options):
        calls.append((first, options))
        return truth(*data)

    monkeypatch.setattr(module, "invert", found)
    return calls


DATA = tuple(v.astype(np.float32).astype(float) if v.dtype == float else v for v in draw(3))
OTHER = draw(4)
INVERT = Staleness(
    stale=(2,), delay=2, local_lr=0.2, uniqueness=None, iterations=3, recovered=4, **PLAIN
)


def updates(server: Server) -> dict[int, np.ndarray]:
    w = server.model
    return {0: trained(w, *OTHER), 2: trained(w, *DATA)}


def test_with_the_clients_data_it_is_as_if_nobody_was_late(monkeypatch):
    with_truth(monkeypatch, DATA)
    server = start(INVERT)
    for t in range(6):
        sent = updates(server)
        expected = server.model + (sent[0] if t < 2 else (sent[0] + sent[2]) / 2)
        assert play(INVERT, server, sent) == pytest.approx(expected, abs=1e-12)
    assert server["switched"] == {}


def test_without_delay_a_perfect_inversion_is_fedavg(monkeypatch):
    with_truth(monkeypatch, DATA)
    algorithm = replace(INVERT, delay=0)
    server = start(algorithm)
    for _ in range(3):
        sent = updates(server)
        expected = server.model + (sent[0] + sent[2]) / 2
        assert play(algorithm, server, sent) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"stop": 0}])
def test_without_inversion_it_is_asynchronous_fedavg_bit_for_bit(options):
    ours, direct = replace(INVERT, **options), replace(INVERT, correction="direct")
    a, b = start(ours), start(direct)
    for _ in range(5):
        sent = updates(a)
        assert np.array_equal(play(ours, a, sent), play(direct, b, sent))


def test_half_of_gamma_is_half_way(monkeypatch):
    with_truth(monkeypatch, DATA)
    algorithms = [replace(INVERT, gamma=g) for g in (0.0, 0.5, 1.0)]
    ends = []
    for algorithm in algorithms:
        server = start(algorithm)
        for t in range(3):
            model = play(algorithm, server, updates(server) if t < 2 else {})
        ends.append(model)
    assert ends[1] == pytest.approx((ends[0] + ends[2]) / 2, abs=1e-12)


def test_the_search_goes_on_from_what_was_found_before(monkeypatch):
    calls = with_truth(monkeypatch, DATA)
    server = start(INVERT)
    for _ in range(4):
        play(INVERT, server, updates(server))
    (cold, options), (warm, _) = calls
    assert cold.x.shape == (4, INPUTS) and cold.labels.shape == (4, CLASSES)
    assert np.array_equal(warm.x, truth(*DATA).x)
    assert options == {"iterations": 3, "lr": 1.0, "kept": 0.05, "box": None}
    calls.clear()
    server = start(algorithm := replace(INVERT, warm_start=False))
    for _ in range(4):
        play(algorithm, server, updates(server))
    assert calls[0][0].x.shape == calls[1][0].x.shape
    assert not np.array_equal(calls[0][0].x, calls[1][0].x)


def test_inversion_ends_where_it_is_no_better(monkeypatch):
    wrong = (-DATA[0], DATA[1])
    calls = with_truth(monkeypatch, wrong)
    algorithm = replace(INVERT, window=1)
    server = start(algorithm)
    for t in range(9):
        play(algorithm, server, updates(server))
        # made up in round 2 for the first time; what came of it is known in round 4
        assert server["switched"] == ({} if t < 4 else {"2": 4})
    assert len(calls) == 3  # rounds 2 and 3, and 4 at half of gamma
    endless = replace(INVERT, switch_back=False)
    server = start(endless)
    calls.clear()
    for _ in range(9):
        play(endless, server, updates(server))
    assert len(calls) == 7


def test_an_update_is_unique_if_it_points_elsewhere():
    rng = np.random.default_rng(0)
    fresh = [np.ones(20) + 0.3 * rng.normal(size=20) for _ in range(6)]
    assert not is_unique(np.ones(20), fresh)
    assert is_unique(np.concatenate([np.ones(10), -np.ones(10)]), fresh)
    assert is_unique(np.ones(20), fresh[:1])
    assert is_unique(100 * -np.ones(20), fresh) and not is_unique(100 * np.ones(20), fresh)
    middle = sorted(fresh, key=lambda u: -u @ sum(fresh) / np.linalg.norm(u))[3]
    assert is_unique(middle, fresh, 0.0) and not is_unique(middle, fresh, 1.0)


def test_updates_like_the_fresh_ones_are_not_inverted(monkeypatch):
    calls = with_truth(monkeypatch, DATA)
    algorithm = replace(INVERT, uniqueness=1.0, delay=0)
    server = start(algorithm, population=4)
    base = trained(server.model, *OTHER)
    rng = np.random.default_rng(0)
    noisy = {i: base + 0.3 * np.abs(base).mean() * rng.normal(size=base.size) for i in (0, 1, 3)}
    play(algorithm, server, noisy | {2: base})
    assert not calls
    play(algorithm, server, noisy | {2: -base})
    assert len(calls) == 1


def test_a_run_goes_on_from_its_state_bit_for_bit():
    algorithm = replace(INVERT, iterations=5, inversion_lr=0.1)
    server = start(algorithm)
    for _ in range(4):
        play(algorithm, server, updates(server))
    plain = {k: v for k, v in server.state.items() if not isinstance(v, np.ndarray)}
    state = server.state | json.loads(json.dumps(plain))
    other = replace(server, state=dict(state), model=server.model.copy())
    for _ in range(3):
        sent = updates(server)
        assert np.array_equal(play(algorithm, server, sent), play(algorithm, other, sent))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": -1}, "delay: expected a whole number from 0"),
        ({"correction": "none"}, "correction: expected"),
        ({"kept": 0}, "kept: expected a number above 0 up to 1"),
        ({"box": (1, 0)}, "box: expected two increasing numbers"),
        ({"targets": "hinge"}, "targets: expected"),
        ({"gamma": 2}, "gamma: expected a number in"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        create("staleness", **options)


def test_clients_that_are_not_there_are_refused():
    with pytest.raises(InvalidInputError, match=r"clients from 0 to 2, got \[3\]"):
        start(Staleness(stale=(3,)))
