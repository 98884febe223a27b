"""DDOME: the loss by hand, what is sent, averaged and left alone, and its reductions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from flcore.algorithms import DDOME, Arrival, FedAvg
from flcore.algorithms.ddome import best_experts, disjoint_clients, expert
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

from flcore.nn import ExpertMixture

SETTINGS = Settings(rounds=3, clients=12, participation=6, alpha=1.0, codec=None, feedback=None)
QUICK = {"local_epochs": 1, "experts": 3, "hidden": 8, "common_epochs": 1}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits").limited(400, 100)


def mixture(router: list[float], experts: list[list[float]]) -> ExpertMixture:
    """Give a mixture whose scores are these, whatever the example."""

    def constant(scores: list[float]) -> torch.nn.Linear:
        layer = torch.nn.Linear(1, len(scores))
        layer.weight.data.zero_()
        layer.bias.data = torch.tensor(scores)
        return layer

    return ExpertMixture([constant(scores) for scores in experts], constant(router))


def loss(model: ExpertMixture, labels: list[int], chosen: list[float], anchor: float, **options):
    n = len(labels)
    aux = {"chosen": torch.tensor(chosen), "anchor": torch.tensor(anchor)}
    weight = torch.full((n,), 1 / n)
    objective = DDOME(experts=len(chosen), kept=1, **options).batch_loss()
    return objective(model, torch.zeros(n, 1), torch.tensor(labels), weight, aux)


# ---- the loss ------------------------------------------------------------------------------------


LOG = [math.log(1), math.log(2), math.log(5)]  # g = 1/8, 2/8, 5/8
EXPERTS = [[0.0, math.log(3)], [0.0, 0.0], [math.log(4), 0.0]]  # p(y=1) = 3/4, 1/2, 1/5


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, -math.log((1 / 6) * (3 / 4) + (5 / 6) * (1 / 5))),
        ({"renormalise": False}, -math.log((1 / 8) * (3 / 4) + (5 / 8) * (1 / 5))),
        (
            {"mixture": "logits"},  # mean scores: 5/6 log 4 and 1/6 log 3
            math.log(4 ** (5 / 6) + 3 ** (1 / 6)) - math.log(3) / 6,
        ),
    ],
)
def test_loss_of_a_normal_client_by_hand(options, value):
    found = loss(mixture(LOG, EXPERTS), [1, 1], [1.0, 0.0, 1.0], 0.0, **options).detach()
    assert found.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"renormalise": False}, {"mixture": "logits"}], ids=["plain", "raw", "logits"]
)
def test_loss_of_an_anchor_is_that_of_its_expert_and_of_the_router(options):
    found = loss(mixture(LOG, EXPERTS), [1, 0], [0.0, 0.0, 1.0], 1.0, **options)
    own = -(math.log(1 / 5) + math.log(4 / 5)) / 2
    assert found.item() == pytest.approx(own - math.log(5 / 8), rel=1e-6)


def test_gradient_of_an_anchors_loss_at_the_routers_scores_is_g_minus_one_hot():
    model = mixture(LOG, EXPERTS)
    loss(model, [1, 0], [0.0, 0.0, 1.0], 1.0).backward()
    np.testing.assert_allclose(model.router.bias.grad, [1 / 8, 2 / 8, 5 / 8 - 1], atol=1e-7)


def test_only_chosen_experts_and_their_g_get_a_gradient():
    model = mixture(LOG, EXPERTS)
    loss(model, [1, 0], [1.0, 0.0, 1.0], 0.0).backward()
    assert model.router.bias.grad[1] == 0 and (model.experts[1].bias.grad == 0).all()
    assert (model.router.bias.grad[[0, 2]] != 0).all()
    assert (model.experts[0].bias.grad != 0).all()


def test_router_that_is_sure_trains_one_expert_alone():
    model = mixture([0.0, 80.0, 0.0], EXPERTS)
    found = loss(model, [1, 0], [1.0, 1.0, 1.0], 0.0)
    found.backward()
    alone = mixture([0.0, 80.0, 0.0], EXPERTS)
    scores = alone(torch.zeros(2, 1), part="experts")[:, 1]
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([1, 0]))
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(
        model.experts[1].bias.grad, alone.experts[1].bias.grad, rtol=1e-6, atol=1e-8
    )
    assert all((model.experts[j].bias.grad.abs() < 1e-12).all() for j in (0, 2))


def test_router_step_scales_the_routers_gradient_and_not_its_scores():
    grads = []
    for factor in (1.0, 0.1):
        model = mixture(LOG, EXPERTS)
        model.router_step = factor
        value = loss(model, [1, 0], [1.0, 0.0, 1.0], 0.0)
        value.backward()
        grads.append((value.item(), model.router.bias.grad.numpy()))
    assert grads[0][0] == grads[1][0]
    np.testing.assert_allclose(grads[1][1], 0.1 * grads[0][1], rtol=1e-6)


# ---- choices -------------------------------------------------------------------------------------


def test_best_experts_have_the_largest_sums_and_ties_go_to_the_lower_number():
    g = np.array([[0.125, 0.25, 0.375, 0.25], [0.125, 0.375, 0.25, 0.25]])
    assert best_experts(g, 1) == [1]
    assert best_experts(g, 2) == [1, 2]
    assert best_experts(g[:, ::-1], 1) == [1]
    assert best_experts(np.full((3, 4), 0.25), 2) == [0, 1]


def test_best_experts_do_not_depend_on_the_order_of_the_examples():
    rng = np.random.default_rng(0)
    g = rng.dirichlet(np.ones(4), 200)
    g = np.concatenate([g, g[:, [1, 0, 2, 3]]])  # experts 0 and 1 have the same exact sum
    g[:, 2:] = 0
    assert {tuple(best_experts(rng.permutation(g), 1)) for _ in range(50)} == {(0,)}


def test_anchors_have_classes_of_their_own():
    counts = np.array([[3, 3, 3, 0], [4, 4, 0, 0], [0, 4, 4, 0], [0, 0, 2, 2], [8, 1, 1, 0]])
    assert disjoint_clients(counts, 2) == [4, 3]  # client 4 has most of one class
    assert disjoint_clients(counts[:4], 3) == [1, 3, 2]


def test_a_round_has_so_many_anchors_and_others_and_nobody_unseen(digits):
    run_ = Simulation(DDOME(**QUICK, unseen=3), "mlp:8", digits, SETTINGS)
    run_.step()
    anchors = run_.server["anchors"]
    assert len(set(anchors)) == 3 and max(anchors) < 9
    for round in range(20):
        drawn = run_.algorithm.select(run_.server, np.random.default_rng(round))
        assert len(set(drawn)) == 6 and max(drawn) < 9
        assert len(set(drawn) & set(anchors)) == 3
    assert list(run_.algorithm.tested(12)) == [9, 10, 11]


# ---- rounds --------------------------------------------------------------------------------------


def test_one_expert_for_all_is_fedavg(digits):
    """The router is of no account: the expert goes the way of the model, but for rounding."""
    options = {"local_epochs": 2, "local_lr": 0.1}
    plain = run(FedAvg(**options), "mlp:8", digits, SETTINGS)
    one = DDOME(**options, experts=1, kept=1, anchor_share=0.0)
    routed = run(one, "mlp:8", digits, SETTINGS)
    assert [r.clients for r in routed] == [r.clients for r in plain]
    for name, value in plain.model.items():
        np.testing.assert_allclose(
            routed.model[f"experts.0.{name}"], value, rtol=0, atol=3e-7, err_msg=name
        )


def test_an_expert_that_nobody_trained_keeps_its_bits_and_counts_add_up(digits):
    run_ = Simulation(
        DDOME(**QUICK, kept=1, anchor_share=0.2), "mlp:8", digits, SETTINGS
    )  # 1 anchor and 5 others, each with one expert
    untouched = 0
    for _ in range(4):
        before = run_.server.model.copy()
        run_.step()
        counts = run_.server["counts"]
        assert counts.sum() == 5 * 1 + 1
        for j, count in enumerate(counts):
            layout = expert(run_.layout, j)
            same = np.array_equal(layout.take(before), layout.take(run_.server.model))
            assert same == (count == 0)
            untouched += same
    assert untouched


def test_an_expert_is_the_mean_over_those_who_had_it(digits):
    run_ = Simulation(DDOME(**QUICK, weighting="examples"), "mlp:8", digits, SETTINGS)
    layout = run_.layout
    size = expert(layout, 0).size()
    before = run_.server.model.copy()
    router = np.zeros(layout.size(), np.float32)
    arrivals = [
        Arrival(0, 1, {"update": router, "expert0": np.full(size, 1.0, np.float32)}),
        Arrival(1, 3, {"update": router, "expert0": np.full(size, 5.0, np.float32)}),
        Arrival(2, 8, {"update": router + 3, "expert2": np.full(size, 2.0, np.float32)}),
    ]
    received = run_.aggregator.receive(arrivals, 0)
    mean = received.mean(run_.algorithm.weights(received))
    run_.algorithm.server_step(run_.server, mean, received)
    change = run_.server.model - before
    np.testing.assert_allclose(expert(layout, 0).take(change), 4.0, rtol=1e-5)
    assert (expert(layout, 1).take(change) == 0).all()
    np.testing.assert_allclose(expert(layout, 2).take(change), 2.0, rtol=1e-5)
    np.testing.assert_allclose(layout.take(change), 2.0, rtol=1e-5)
    assert run_.server["counts"].tolist() == [2, 0, 1]


def test_messages_hold_the_router_and_the_experts_of_the_client_only(digits):
    run_ = Simulation(DDOME(**QUICK, kept=2), "mlp:8", digits, SETTINGS)
    first = run_.step()
    anchor = run_.server["anchors"][1]
    size, router = 64 * 8 + 8 + 80 + 10, 8 * 8 + 8 + 8 * 3 + 3
    to_anchor, up, _ = run_._downlink(run_.clients.client(anchor, 1))
    assert {name: np.size(v) for name, v in to_anchor.items()} == {
        "model": router,
        "anchor": 1,
        "expert1": size,
    }
    assert up == 0
    other = next(i for i in range(12) if i not in run_.server["anchors"])
    client = run_.clients.client(other, 1)
    payload, up, down = run_._downlink(client)
    experts = sorted(name for name in payload if name.startswith("expert"))
    assert len(payload) == 3 and len(experts) == 2 and up > 16
    assert 4 * (router + 2 * size) <= down < 4 * (router + 2 * size) + 300
    model = run_.algorithm.own_model(payload, client)
    chosen = run_.layout.named(model)["chosen"]
    assert [f"expert{j}" for j in np.flatnonzero(chosen)] == experts
    lower = 4 * (6 * router + (3 * 1 + 3 * 2) * size)
    assert lower <= first.bytes_up < lower + 12 * 8 * 10 + 6 * 600


def test_a_client_changes_its_experts_and_the_router_only(digits):
    run_ = Simulation(DDOME(**QUICK, kept=1), "mlp:8", digits, SETTINGS)
    run_.step()
    other = next(i for i in range(12) if i not in run_.server["anchors"])
    client = run_.clients.client(other, 1)
    work = run_.algorithm.client_begin(run_._downlink(client)[0], client)
    mine = int(np.flatnonzero(work.aux["chosen"])[0])
    free = {n for n, p in run_.layout.slices.items() if not work.spec.frozen[p].all()}
    expected = {n for n in run_.layout.shapes if n.startswith((f"experts.{mine}.", "router."))}
    assert free == expected


def test_the_server_trains_the_common_expert_once_and_all_have_it(digits):
    algorithm = DDOME(**QUICK | {"common_epochs": 30, "local_lr": 0.3}, unseen=2)
    run_ = Simulation(algorithm, "mlp:8", digits, SETTINGS, server_examples=np.arange(100))
    layout, start = run_.layout, run_.server.model.copy()
    first = run_.step()
    common = [n for n in layout.shapes if n.startswith("common.")]
    client = run_.clients.client(0, 1)
    for name in common:
        trained = layout.named(run_.server.model)[name]
        assert np.array_equal(layout.named(client.initial)[name], trained)
        assert not np.array_equal(layout.named(start)[name], trained)
    model = torch.from_numpy(run_.server.model)
    scores = run_.server.tools.forward(run_.server.tools.x, model, part="common")
    assert (scores.argmax(1) == run_.server.tools.y).float().mean() > 0.8
    before = run_.server.model.copy()
    second = run_.step()
    for name in common:
        same = layout.named(before)[name], layout.named(run_.server.model)[name]
        assert np.array_equal(*same)
    size = sum(layout.named(before)[name].size for name in common) + 3  # and which are chosen
    assert first.bytes_down - second.bytes_down > 12 * 4 * size - 2000


@pytest.mark.parametrize("options", [{}, {"renormalise": False}, {"mixture": "logits"}])
def test_clients_trained_together_end_where_they_do_one_after_another(digits, options):
    algorithm = DDOME(**QUICK, **options)
    runs = [
        run(algorithm, "mlp:8", digits, replace(SETTINGS, execution=execution))
        for execution in ("sequential", "batched")
    ]
    for name, value in runs[0].model.items():
        np.testing.assert_allclose(runs[1].model[name], value, rtol=1e-5, atol=1e-6)


def test_a_stopped_run_goes_on_with_the_same_bits(digits, tmp_path):
    class Stop(Observer):
        def should_stop(self) -> bool:
            return True

    own = np.arange(60)
    algorithm = DDOME(**QUICK, unseen=2)
    whole = run(algorithm, "mlp:8", digits, SETTINGS, server_examples=own)
    args = (algorithm, "mlp:8", digits, SETTINGS)
    run(*args, server_examples=own, output=tmp_path / "run", observer=Stop())
    resumed = run(*args, server_examples=own, output=tmp_path / "run", resume=True)
    assert [(r.accuracy, r.bytes_up) for r in resumed] == [(r.accuracy, r.bytes_up) for r in whole]
    for name, value in whole.model.items():
        assert np.array_equal(resumed.model[name], value)


def test_experts_start_from_numbers_of_their_own_or_from_the_given_network():
    starts = []
    for seed in (0, 0, 1):
        given = build_model("mlp:8", (1, 8, 8), 10, np.random.default_rng(seed))
        starts.append(DDOME(experts=3).prepare_model(given).experts)
    first, again, other = starts
    weights = [e[1].weight for e in first]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[0].flatten().sort().values, weights[1].flatten().sort().values)
    assert torch.equal(weights[2], again[2][1].weight)
    assert not torch.equal(weights[2], other[2][1].weight)
    given = build_model("mlp:8", (1, 8, 8), 10, np.random.default_rng(0))
    same = DDOME(experts=3, fresh=False).prepare_model(given)
    assert all(torch.equal(e[1].weight, given[1].weight) for e in [*same.experts, same.common])


def test_training_experts_before_the_router_leaves_what_training_both_does_not():
    """Two half planes with a linear rule each: experts that a random router divided stay mixed."""
    torch.manual_seed(0)
    x = torch.randn(500, 2)
    first = x[:, 0] > x[:, 1]  # which of two orthonormal directions is the larger
    positive = x.sum(1) > 0
    y = torch.where(first, positive, ~positive).long()
    objective = DDOME(experts=2, kept=2).batch_loss()
    aux = {"chosen": torch.ones(2), "anchor": torch.tensor(0.0)}
    weight = torch.full((len(x),), 1 / len(x))

    def train(together: bool, seed: int) -> float:
        torch.manual_seed(seed)
        parts = [torch.nn.Linear(2, 2) for _ in range(3)]
        model = ExpertMixture(parts[:2], parts[2])
        experts, router = list(model.experts.parameters()), list(model.router.parameters())
        value = torch.zeros(())
        for phase in [[*experts, *router]] * 2 if together else [experts, router]:
            optimizer = torch.optim.Adam(phase, 0.2)
            for _ in range(60):
                optimizer.zero_grad()
                value = objective(model, x, y, weight, aux)
                value.backward()
                optimizer.step()
        return float(value.detach())

    for seed in range(2):
        assert train(True, seed) < 0.06 < 0.2 < train(False, seed)


def four_classes_each(labels: np.ndarray, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Give 300 examples to the server, and deal the rest to 5 anchors, 35 clients and 10 unseen.

    Anchors have a pair of classes each, the others two pairs; those of the unseen clients are
    three combinations of pairs that no other client has.
    """
    rng = np.random.default_rng([7, seed])
    own = rng.permutation(len(labels))[:300]
    rest = np.setdiff1d(np.arange(len(labels)), own)
    pairs = rng.permutation(10).reshape(5, 2)
    both = [(a, b) for a in range(5) for b in range(a)]
    mixed = rng.permutation(len(both))
    rare = [both[i] for i in mixed[:3]]
    usual = [combination for combination in both if combination not in rare]
    two = [usual[i % 7] for i in range(35)] + [rare[i % 3] for i in range(10)]
    held = [tuple(pair) for pair in pairs] + [(*pairs[a], *pairs[b]) for a, b in two]
    parts: list[list[int]] = [[] for _ in held]
    for label in range(10):
        holders = [i for i, classes in enumerate(held) if label in classes]
        pool = rng.permutation(rest[labels[rest] == label])
        for i, part in zip(holders, np.array_split(pool, len(holders)), strict=True):
            parts[i] += part.tolist()
    return own, [np.array(sorted(part)) for part in parts]


@pytest.mark.slow
def test_anchors_help_unseen_combinations_of_classes():
    """Experts of 8 hidden units: see the page of reproductions for the table."""
    digits = load_dataset("digits")
    shared = {"local_epochs": 5, "weighting": "uniform"}
    for seed in range(2):
        own, parts = four_classes_each(digits.y_train, seed)
        settings = Settings(
            rounds=40, clients=50, participation=10, codec=None, feedback=None, seed=seed
        )
        with_anchors, without = (
            run(
                DDOME(**shared, unseen=10, anchor_share=share),
                "mlp:8",
                digits,
                settings,
                partition=parts,
                server_examples=own,
            ).mean_accuracy(10)
            for share in (0.5, 0.0)
        )
        plain = Simulation(
            FedAvg(**shared),
            "mlp:8",
            digits,
            replace(settings, clients=40),
            partition=parts[:40],
            server_examples=own,
        )
        x, y = plain._test
        tests = [np.flatnonzero(np.isin(y, digits.y_train[part])) for part in parts[40:]]
        averaged = []
        for round in range(40):
            plain.step()
            if round >= 30:
                model = plain.server.model
                averaged += [plain.trainer.evaluate(model, x[own], y[own])[0] for own in tests]
        assert with_anchors > without + 0.03
        assert with_anchors > np.mean(averaged) + 0.01


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "experts: expected a whole number from 1, got 0"),
        ({"experts": 2, "kept": 3}, "kept: expected at most experts=2, got 3"),
        ({"anchor_share": 1.5}, "anchor_share: expected a share from 0 to 1, got 1.5"),
        ({"router_step": 0.0}, "router_step: expected a number above 0"),
        ({"mixture": "means"}, "mixture: expected"),
        ({"selection": "bernoulli"}, "selection: expected"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        DDOME(**options)


def test_too_few_clients_are_refused(digits):
    with pytest.raises(InvalidInputError, match="unseen: expected fewer than the 12 clients"):
        Simulation(DDOME(unseen=12), "mlp:8", digits, SETTINGS)
    with pytest.raises(InvalidInputError, match="experts: expected fewer than the 3 clients"):
        Simulation(DDOME(**QUICK, unseen=9), "mlp:8", digits, SETTINGS).step()
