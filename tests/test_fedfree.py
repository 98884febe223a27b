"""FedFree: entropies, projections and layer steps by hand; clients with networks of their own."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from flcore.algorithms import (
    Arrival,
    Arrivals,
    Client,
    FedAvg,
    FedFree,
    Layout,
    LocalResult,
    LocalWork,
    Server,
)
from flcore.algorithms.fedfree import histogram_entropy, layers, project
from flcore.errors import InvalidInputError
from flcore.simulation import (
    Dataset,
    Observer,
    Settings,
    Simulation,
    build_model,
    load_dataset,
    run,
)

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

SETTINGS = Settings(rounds=3, clients=4, participation=4, alpha=1.0, codec=None, feedback=None)
POOL = ("mlp:8", "mlp:12", "mlp:8,8")
SHAPES = {"1.weight": (3, 2), "1.bias": (3,), "3.weight": (2, 3), "3.bias": (2,)}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits").limited(400, 100)


def server(values: np.ndarray, **options) -> tuple[FedFree, Server]:
    """Give a server of two linear layers."""
    algorithm = FedFree(**options)
    layout = algorithm.layout(Layout(SHAPES))
    made = Server(values.astype(np.float64), layout, population=4, participants=4)
    algorithm.server_begin(made)
    return algorithm, made


def message(client: int, layer: str, at: float, weight: np.ndarray, bias: np.ndarray) -> Arrival:
    payload = {f"{layer}.weight": weight, f"{layer}.bias": bias, f"{layer}.depth": at}
    return Arrival(client, 10, payload)


# ---- entropy -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        (np.linspace(-3, 5, 256), 8.0),
        (np.full(50, 0.7), 0.0),
        (np.append(np.zeros(255), 1.0), 0.0368745063),
        (np.array([0.0, 0.0, 1.0, 1.0]), 1.0),
    ],
)
def test_shannon_entropy_by_hand(values, bits):
    assert histogram_entropy(values) == pytest.approx(bits, abs=1e-10)


def test_entropies_of_order_two_by_hand():
    values = np.array([0.0, 0.0, 0.0, 1.0])  # p = 3/4, 1/4
    assert histogram_entropy(values, kind="tsallis") == pytest.approx(1 - 10 / 16)
    assert histogram_entropy(values, kind="collision") == pytest.approx(-math.log2(10 / 16))


def test_entropy_does_not_change_under_affine_maps_and_stays_in_its_range():
    rng = np.random.default_rng(0)
    for bins in (2, 16, 256):
        values = rng.standard_normal((40, 30))
        entropy = histogram_entropy(values, bins)
        assert 0 < entropy <= math.log2(bins)
        for scale, shift in ((0.5, 0.0), (4.0, 2.0), (3.7, -11.3)):
            assert histogram_entropy(scale * values + shift, bins) == pytest.approx(
                entropy, abs=0.02
            )
        assert histogram_entropy(2.0 * values, bins) == entropy  # no rounding at powers of two


# ---- projection ----------------------------------------------------------------------------------


def test_projection_by_hand():
    mine, theirs = np.full(5, 9.0), np.array([1.0, 2.0, 3.0])
    assert project(theirs, mine).tolist() == [1, 2, 3, 9, 9]
    assert project(theirs, mine, "zero").tolist() == [1, 2, 3, 0, 0]
    assert project(mine, theirs).tolist() == [9, 9, 9]
    assert mine.tolist() == [9, 9, 9, 9, 9] and theirs.tolist() == [1, 2, 3]
    square = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert project(square, np.zeros((2, 3))).tolist() == [[1, 2, 3], [4, 0, 0]]


def test_layers_are_weights_with_their_biases_and_norms_are_none():
    named = {
        "a.0.weight": np.ones((4, 1, 3, 3)),
        "a.1.weight": np.ones(4),
        "a.1.bias": np.ones(4),
        "head.weight": np.ones((2, 4)),
        "head.bias": np.ones(2),
    }
    assert layers(named) == {"a.0": ["a.0.weight"], "head": ["head.weight", "head.bias"]}


# ---- the server's step ---------------------------------------------------------------------------


def test_expected_step_goes_to_the_mean_of_the_layers_received():
    rng = np.random.default_rng(0)
    algorithm, made = server(rng.standard_normal(17), alpha=0.1, mapping="depth")
    before = made.model.copy()
    sent = [(rng.standard_normal((3, 2)), rng.standard_normal(3)) for _ in range(2)]
    arrivals = Arrivals([message(i, "0", 0.0, w, b) for i, (w, b) in enumerate(sent)])
    algorithm.server_step(made, np.empty(0), arrivals)
    mean = np.concatenate(
        [np.mean([w for w, _ in sent], 0).ravel(), np.mean([b for _, b in sent], 0)]
    )
    np.testing.assert_allclose(made.model[:9], before[:9] - 0.2 * (before[:9] - mean), atol=1e-12)
    assert np.array_equal(made.model[9:], before[9:])  # nobody sent a last layer


def test_expected_step_is_the_gradient_of_the_loss_on_gaussian_inputs():
    """E ||Y_i - Y_j||^2 = ||W_i - W_j||^2 + ||b_i - b_j||^2: many inputs, and torch's gradient."""
    rng = torch.Generator().manual_seed(0)
    w, b = torch.randn(3, 2, generator=rng), torch.randn(3, generator=rng)
    g = torch.randn(3, 2, generator=rng, requires_grad=True)
    c = torch.randn(3, generator=rng, requires_grad=True)
    x = torch.randn(400_000, 2, generator=rng)
    loss = ((x @ w.T + b - x @ g.T - c) ** 2).sum(1).mean()
    exact = ((w - g) ** 2).sum() + ((b - c) ** 2).sum()
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()
    algorithm = FedFree(alpha=0.1)
    tensors = [g.detach().numpy().copy(), c.detach().numpy().copy()]
    algorithm.teach(tensors, [w.numpy(), b.numpy()], np.random.default_rng(0))
    np.testing.assert_allclose(tensors[0], (g - 0.1 * g.grad).detach(), atol=0.02)
    np.testing.assert_allclose(tensors[1], (c - 0.1 * c.grad).detach(), atol=0.02)


def test_probed_step_is_the_gradient_on_these_very_inputs():
    algorithm = FedFree(alpha=0.05, probes=7)
    draw = np.random.default_rng(1)
    w, b = torch.from_numpy(draw.standard_normal((3, 2))), torch.from_numpy(draw.standard_normal(3))
    g = torch.from_numpy(draw.standard_normal((3, 2))).requires_grad_()
    c = torch.from_numpy(draw.standard_normal(3)).requires_grad_()
    x = torch.from_numpy(np.random.default_rng(5).standard_normal((7, 2)))
    ((x @ w.T + b - x @ g.T - c) ** 2).sum(1).mean().backward()
    tensors = [g.detach().numpy().copy(), c.detach().numpy().copy()]
    algorithm.teach(tensors, [w.numpy(), b.numpy()], np.random.default_rng(5))
    np.testing.assert_allclose(tensors[0], (g - 0.05 * g.grad).detach(), atol=1e-12)
    np.testing.assert_allclose(tensors[1], (c - 0.05 * c.grad).detach(), atol=1e-12)


def test_enough_probes_lead_to_the_mean_exactly():
    """With at least fan-in + 1 inputs of full rank the minimiser is the mean of the layers."""
    algorithm = FedFree(alpha=0.1, probes=3, server_steps=3000)
    draw = np.random.default_rng(0)
    tensors = [draw.standard_normal((3, 2)), draw.standard_normal(3)]
    mean = [draw.standard_normal((3, 2)), draw.standard_normal(3)]
    algorithm.teach(tensors, mean, draw)
    for found, expected in zip(tensors, mean, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("probes", [0, 4])
def test_layers_equal_to_the_servers_change_nothing(probes):
    start = np.random.default_rng(0).standard_normal(17)
    algorithm, made = server(start, probes=probes, mapping="depth")
    before = made.model.copy()
    named = made.layout.named(before)
    sent = [named["1.weight"].copy(), named["1.bias"].copy()]
    arrivals = Arrivals([message(i, "7", 0.0, *sent) for i in range(3)])
    algorithm.server_step(made, np.empty(0), arrivals)
    assert np.array_equal(made.model, before)
    assert made["given"] == {}  # nothing is gained, either


def test_layers_of_other_shapes_pull_only_where_they_reach():
    algorithm, made = server(np.zeros(17), alpha=0.25)
    small = message(0, "0", 0.0, np.full((2, 2), 4.0), np.full(2, 8.0))
    algorithm.server_step(made, np.empty(0), Arrivals([small]))
    named = made.layout.named(made.model)
    assert named["1.weight"].tolist() == [[2, 2], [2, 2], [0, 0]]
    assert named["1.bias"].tolist() == [4, 4, 0]


def test_layers_meet_the_nearest_of_their_kind_by_depth_or_all_of_it():
    named = {
        "0.weight": np.ones((4, 1, 3, 3)),
        "1.weight": np.ones((5, 4)),
        "2.weight": np.ones((2, 5)),
    }
    conv, linear = np.ones((2, 3, 3, 3)), np.ones((7, 7))
    for at, expected in ((0.0, ["1"]), (0.6, ["1"]), (0.75, ["1"]), (0.8, ["2"]), (1.0, ["2"])):
        near = FedFree(mapping="depth").same("x", {"x.weight": linear, "x.depth": at}, named)
        assert near == expected
    assert FedFree(mapping="depth").same("x", {"x.weight": conv, "x.depth": 1.0}, named) == ["0"]
    assert FedFree().same("x", {"x.weight": linear}, named) == ["1", "2"]
    assert (
        FedFree(mapping="depth").same("x", {"x.weight": np.ones((2, 3, 4)), "x.depth": 0.0}, named)
        == []
    )


# ---- what comes back -----------------------------------------------------------------------------


def test_the_pair_that_gains_most_is_sent_and_nothing_where_nothing_is_gained():
    spread = np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])  # 6 values: log2(6) bits
    start = np.concatenate([spread.ravel(), np.arange(3.0), spread.ravel(), np.arange(2.0)])
    algorithm, made = server(start, mapping="depth")
    two, one = np.array([[0.0, 1.0], [0.0, 1.0]]), np.zeros((2, 2))
    arrivals = Arrivals(
        [
            Arrival(
                0,
                1,
                {"0.weight": two, "0.depth": 0.0, "2.weight": one, "2.depth": 1.0},
            ),
            message(1, "0", 0.0, np.random.default_rng(0).standard_normal((40, 40)), np.ones(40)),
        ]
    )
    algorithm.server_step(made, np.empty(0), arrivals)
    assert made["given"] == {"0": ["2", "3"]}  # the constant layer; client 1 has more bits
    payload = algorithm.downlink(made, 0)
    named = made.layout.named(made.model)
    assert set(payload) == {"model", "2.weight", "2.bias"} and payload["model"].size == 0
    assert np.array_equal(payload["2.weight"], named["3.weight"])
    assert set(algorithm.downlink(made, 1)) == {"model"}
    rich = message(0, "0", 0.0, np.random.default_rng(0).standard_normal((40, 40)), np.ones(40))
    algorithm.server_step(made, np.empty(0), Arrivals([rich]))
    assert made["given"] == {}


def test_a_client_replaces_what_it_was_sent_and_sends_what_changed_most(digits):
    run_ = Simulation(FedFree(pool=POOL, local_epochs=1), "mlp:16", digits, SETTINGS)
    run_.step()
    client = run_.clients.client(1, 1)
    own = client.layout.named(client.state["personal"])
    given = {"model": np.empty(0, np.float32), "3.weight": np.full((2, 3), 7.0, np.float32)}
    work = run_.algorithm.client_begin(given, client)
    start = client.layout.named(work.start)
    assert (start["3.weight"].ravel()[:6] == 7).all()
    assert np.array_equal(start["3.weight"].ravel()[6:], own["3.weight"].ravel()[6:])
    assert np.array_equal(start["1.weight"], own["1.weight"])
    assert (own["3.weight"] != 7).all()  # what is tested stays as it was trained


def test_layers_that_change_most_are_sent():
    algorithm = FedFree(critical=1)
    layout = algorithm.layout(Layout(SHAPES))
    client = Client(0, 0, 5, layout, 4, 4, {}, np.random.default_rng(0), np.zeros(17))
    for changed, expected in ((range(9), "1"), (range(9, 17), "3")):
        end = np.zeros(17)
        end[list(changed)] = 2.0
        end[[0, 16]] += 0.5
        result = LocalResult(LocalWork(np.zeros(17), algorithm.spec(0)), end, 1, 0.0)
        payload = algorithm.client_end(result, client)
        assert set(payload) == {f"{expected}.{part}" for part in ("weight", "bias", "depth")}
        assert payload[f"{expected}.depth"] == (0.0 if expected == "1" else 1.0)
        assert np.array_equal(client.state["personal"], end)


# ---- rounds --------------------------------------------------------------------------------------


def test_clients_have_networks_and_random_numbers_of_their_own(digits):
    run_ = Simulation(FedFree(pool=POOL, local_epochs=1), "mlp:16", digits, SETTINGS)
    sizes = [run_.clients.client(i, 0).initial.size for i in range(4)]
    assert sizes == [65 * 8 + 90, 65 * 12 + 130, 65 * 8 + 72 + 90, 65 * 8 + 90]
    first, fourth = (run_.clients.client(i, 0).initial for i in (0, 3))
    assert not np.array_equal(first, fourth)
    history = [run_.step() for _ in range(3)]
    states = [run_.clients.states[i]["personal"] for i in range(4)]
    assert [state.size for state in states] == sizes
    assert history[0].bytes_down == 0 < history[0].bytes_up


def test_nothing_sent_is_local_training_alone(digits):
    """Client 0's model after two rounds is SGD on its own data, its numbers those of FedAvg."""
    alone = FedFree(pool=POOL, local_epochs=1, critical=0)
    run_ = Simulation(alone, "mlp:16", digits, SETTINGS)
    records = [run_.step(), run_.step()]
    assert sum(r.bytes_up + r.bytes_down for r in records) == 0
    client = run_.clients.client(0, 0)
    model = build_model("mlp:8", digits.example_shape, 10, np.random.default_rng(0))
    with torch.no_grad():
        first = 0
        for p in model.parameters():
            p.copy_(torch.from_numpy(client.initial[first : first + p.numel()]).view_as(p))
            first += p.numel()
    single = Settings(rounds=2, clients=1, participation=1, codec=None, feedback=None)
    history = run(FedAvg(local_epochs=1), model, digits, single, partition=[run_.partition[0]])
    expected = np.concatenate([v.ravel() for v in history.model.values()])
    np.testing.assert_allclose(run_.clients.states[0]["personal"], expected, rtol=1e-4, atol=1e-5)


def test_clients_trained_together_end_where_they_do_one_after_another(digits):
    algorithm = FedFree(pool=("mlp:8", "mlp:8", "mlp:12"), local_epochs=1)
    ends = []
    for execution in ("sequential", "batched"):
        run_ = Simulation(algorithm, "mlp:16", digits, replace(SETTINGS, execution=execution))
        for _ in range(3):
            run_.step()
        ends.append([run_.clients.states[i]["personal"] for i in range(4)])
    for one, other in zip(*ends, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def two_classes_each(labels: np.ndarray, examples: int, seed: int) -> list[np.ndarray]:
    """Give ten clients examples of two classes each, every class at two clients."""
    rng = np.random.default_rng([11, seed])
    order, parts = rng.permutation(10), [np.empty(0, np.int64)] * 10
    for k, label in enumerate(order):
        halves = np.array_split(rng.permutation(np.flatnonzero(labels == label)), 2)
        for client, half in zip((k, (k + 1) % 10), halves, strict=True):
            parts[client] = np.concatenate([parts[client], half])
    rng = np.random.default_rng(seed)
    return [np.sort(rng.permutation(np.sort(part))[:examples]) for part in parts]


@pytest.mark.slow
def test_layers_that_changed_most_help_more_than_random_ones():
    """Two digits and 16 examples a client: see the page of reproductions for the table."""
    digits = load_dataset("digits")
    widths = (32, 48, 64, 96)
    pool = (*(f"mlp:{w}" for w in widths), *(f"mlp:{w},{w}" for w in widths))
    gains = []
    for seed in range(2):
        settings = Settings(
            rounds=30, clients=10, participation=10, codec=None, feedback=None, seed=seed
        )
        accuracies = [
            run(
                FedFree(
                    pool=pool,
                    choice=choice,
                    local_epochs=2,
                    local_lr=0.05,
                    lr_decay=1.0,
                    weight_decay=0.0,
                    clip=None,
                ),
                "mlp:64,64",
                digits,
                settings,
                partition=two_classes_each(digits.y_train, 16, seed),
            ).mean_accuracy(10)
            for choice in ("change", "random")
        ]
        gains.append(accuracies[0] - accuracies[1])
    assert np.mean(gains) > 0 and min(gains) > -0.01


@pytest.mark.parametrize(
    "uplink", [{"codec": None, "feedback": None}, {}], ids=["dense", "packets"]
)
def test_a_stopped_run_goes_on_with_the_same_bits(digits, tmp_path, uplink):
    class Stop(Observer):
        def should_stop(self) -> bool:
            return True

    settings = Settings(rounds=3, clients=4, participation=3, alpha=1.0, **uplink)
    args = (FedFree(pool=POOL, local_epochs=1), "mlp:16", digits, settings)
    whole = run(*args)
    run(*args, output=tmp_path / "run", observer=Stop())
    resumed = run(*args, output=tmp_path / "run", resume=True)
    assert [(r.accuracy, r.bytes_down) for r in resumed] == [
        (r.accuracy, r.bytes_down) for r in whole
    ]
    assert sum(r.bytes_down for r in whole) > 0
    for name, value in whole.model.items():
        assert np.array_equal(resumed.model[name], value)


def test_convolutional_and_normalised_networks_take_part(digits):
    settings = Settings(rounds=2, clients=3, participation=3, alpha=None)
    pool = ("cnn", "mlp-bn", "cnn-gn")
    history = run(FedFree(pool=pool, local_epochs=1, batch_size=50), "cnn", digits, settings)
    assert len(history) == 2 and math.isfinite(history[1].loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critical": -1}, "critical: expected a whole number from 0, got -1"),
        ({"bins": 1}, "bins: expected a whole number from 2, got 1"),
        ({"alpha": 1.0}, "alpha: expected a number above 0 and below 1, got 1.0"),
        ({"choice": "all"}, "choice: expected"),
        ({"entropy": "renyi"}, "entropy: expected"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        FedFree(**options)


def test_a_network_that_there_is_not_is_refused(digits):
    with pytest.raises(InvalidInputError, match="there is no 'lenet'"):
        Simulation(FedFree(pool=("lenet",)), "mlp", digits, SETTINGS).step()
