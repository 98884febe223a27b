"""FedKA: the schedule, both local phases, the vote, and fine-tuning at the server."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from algorithm_problem import blobs, play, simulation
from flcore.algorithms import Arrival, Arrivals, FedAvg, FedKA, Layout, Server
from flcore.algorithms._votes import majority
from flcore.algorithms.fedka import ADAM, Alignment, strength
from flcore.errors import InvalidInputError
from flcore.losses import multi_kernel_mmd
from flcore.nn import DomainAdversarial
from flcore.simulation import load_dataset

SMALL = {"rounds": 6, "batches": 4, "accumulate": 2, "vote_batches": 6, "batch_size": 8}
TARGET = {"without": (2,), "server_examples": np.arange(24, 36)}
"""Group 2 of the blobs is the domain without labels."""


def player(**options):
    return simulation(FedKA(**(SMALL | options)), "mlp", **TARGET)


# ---- schedule and vote ---------------------------------------------------------------------------


def test_strength_rises_from_0_to_almost_1():
    assert strength(0, 200, 32)[0] == 0.0
    assert strength(199, 200, 32)[-1] == pytest.approx(0.98661, abs=1e-4)
    over = np.concatenate([strength(t, 3, 4) for t in range(3)])
    np.testing.assert_allclose(over, 2 / (1 + np.exp(-5 * np.arange(12) / 12)) - 1, rtol=1e-14)


def test_majority_by_hand_with_ties_to_the_lowest_class():
    named = [np.array(v) for v in ([3, 0, 2, 1], [3, 1, 2, 0], [1, 1, 0, 2])]
    assert majority(named).tolist() == [3, 1, 2, 0]


def test_clients_that_agree_have_their_way():
    named = np.array([4, 0, 2])
    assert majority([named] * 5).tolist() == [4, 0, 2]
    assert majority([named]).tolist() == [4, 0, 2]


# ---- local phases --------------------------------------------------------------------------------


def problem(**options):
    """The loss, a network with two inputs, and what a client's batches need."""
    torch.manual_seed(0)
    model = DomainAdversarial(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4), 3, hidden=5)
    frozen = torch.nn.Linear(2, 3)

    def forward(x, parameters=None, *, features=False, **options):
        if parameters is not None:
            return frozen(x).detach(), None
        return (model.features(x), model(x)) if features else model(x, **options)

    loss = Alignment(FedKA(**({"batches": 4, "accumulate": 2, "batch_size": 3} | options)))
    aux = {
        "global": torch.zeros(1),
        "target": torch.randn(7, 2),
        "drawn": torch.randint(7, (8, 3)),
        "strength": torch.tensor([0.0, 0.2, 0.4, 0.6]),
    }
    return loss, model, forward, frozen, aux


def test_batch_of_the_first_phase_by_hand():
    loss, model, forward, _, aux = problem()
    x, y, weight = torch.randn(3, 2), torch.tensor([0, 3, 1]), torch.full((3,), 1 / 3)
    value = loss(forward, x, y, weight, aux | {"step": 2})
    with torch.no_grad():
        entropy, domain = torch.nn.functional.cross_entropy, model.domain
        target = aux["target"][aux["drawn"][2]]
        expected = entropy(model(x), y)
        expected += entropy(domain(model.features(x)), torch.zeros(3, dtype=torch.long))
        expected += entropy(domain(model.features(target)), torch.ones(3, dtype=torch.long))
    torch.testing.assert_close(value, expected)


def test_gradient_of_the_domains_reaches_the_features_reversed():
    """Features: CE - a * domains; domain head: the plain gradient of the domains."""
    x, y, weight = torch.randn(3, 2), torch.tensor([0, 3, 1]), torch.full((3,), 1 / 3)
    slopes = {}
    for adversarial in (True, False):
        loss, model, forward, _, aux = problem(adversarial=adversarial)
        loss(forward, x, y, weight, aux | {"step": 3}).backward()
        slopes[adversarial] = model.features.weight.grad
        assert (model.domain[0].weight.grad is not None) == adversarial
    entropy, target = torch.nn.functional.cross_entropy, aux["target"][aux["drawn"][3]]
    model.zero_grad()
    domains = entropy(model.domain(model.features(x)), torch.zeros(3, dtype=torch.long))
    domains = domains + entropy(
        model.domain(model.features(target)), torch.ones(3, dtype=torch.long)
    )
    (plain,) = torch.autograd.grad(domains, model.features.weight)
    torch.testing.assert_close(slopes[True], slopes[False] - 0.6 * plain)


def test_first_batch_does_not_move_features_against_domains():
    x, y, weight = torch.randn(3, 2), torch.tensor([0, 3, 1]), torch.full((3,), 1 / 3)
    slopes = []
    for adversarial in (True, False):
        loss, model, forward, _, aux = problem(adversarial=adversarial)
        loss(forward, x, y, weight, aux | {"step": 0}).backward()
        slopes.append(model.features.weight.grad)
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=0)


@pytest.mark.parametrize("matching", ["mean", "last"])
def test_matching_step_by_hand(matching):
    """Step 5 is the second of two, over batches 2 and 3; "last" has batch 3 alone, halved."""
    loss, model, forward, frozen, aux = problem(matching=matching)
    x = torch.randn(6, 2)
    value = loss(forward, x, None, None, aux | {"step": 5})
    with torch.no_grad():
        terms = []
        for i, batch in enumerate((2, 3)):
            target = frozen(aux["target"][aux["drawn"][4 + batch]])
            own = model.features(x[3 * i : 3 * i + 3])
            terms.append(aux["strength"][batch] * multi_kernel_mmd(own, target))
    expected = sum(terms) / 2 if matching == "mean" else terms[1] / 2
    torch.testing.assert_close(value, expected)


def test_first_matching_batch_of_a_run_is_0():
    loss, _, forward, _, aux = problem(accumulate=1)
    assert loss(forward, torch.randn(3, 2), None, None, aux | {"step": 4}).item() == 0.0


def test_batches_are_full_and_as_many_as_the_phases_need():
    run = player()
    view = run.algorithm.data_view(run.clients.client(0, 0))
    assert view.sizes == [8] * 4 + [16] * 2
    seen = np.bincount(view.order, minlength=36)[:12]
    assert view.order.size == 64 and seen.min() == 5 and seen.max() == 6  # 64 draws of 12
    assert run.algorithm.batch_loss() is not None
    view = player(align=False).algorithm.data_view(run.clients.client(0, 0))
    assert view.sizes == [8] * 4


def test_domain_head_leaves_the_classes_alone_and_depends_on_its_seed_only():
    body, head = torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)
    model, again = (DomainAdversarial(body, head, 3, seed=1) for _ in range(2))
    x = torch.randn(5, 2)
    scores, domains = model(x, reversal=0.7)
    assert torch.equal(scores, head(body(x))) and torch.equal(model(x), scores)
    assert torch.equal(domains, again(x, reversal=0.1)[1])
    assert not torch.equal(domains, DomainAdversarial(body, head, 3, seed=2)(x, reversal=0.7)[1])
    with pytest.raises(InvalidInputError, match="domains from 2"):
        DomainAdversarial(body, head, 3, domains=1)


# ---- server --------------------------------------------------------------------------------------


class Quadratic:
    """A server whose model is two numbers; clients' models name the class of their first one."""

    x = np.arange(10.0)

    def scores(self, model, x=None):
        return np.eye(3)[np.full(10, round(float(model[0])))]

    def gradient(self, model, x=None, y=None):
        return np.array([1.0, 3.0]) * (model - 0.1 * np.mean(y))


def serve(algorithm, rounds=2, ends=((2, 0), (2, 1), (1, 0))):
    server = Server(np.zeros(2), Layout({"w": (2,)}), 3, 3, tools=Quadratic())
    sent = []
    for _ in range(rounds):
        base = algorithm.downlink(server, 0)["model"].copy()
        sent.append(base)
        updates = [np.array(end, float) - base for end in ends]
        arrivals = Arrivals([Arrival(i, 5, {"update": u}) for i, u in enumerate(updates)])
        mean = arrivals.mean(algorithm.weights(arrivals))
        algorithm.server_step(server, mean, arrivals)
        server.round += 1
    return server, sent


def test_fine_tuning_is_adam_with_lasting_moments_on_the_votes():
    """Two of three clients say class 2: the gradient draws to 0.2.  Against torch.optim.Adam."""
    algorithm = FedKA(**(SMALL | {"local_lr": 0.01}))
    server, _ = serve(algorithm)
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.01, betas=ADAM[:2], eps=ADAM[2])
    for round in range(2):
        with torch.no_grad():
            w.copy_(torch.tensor([5 / 3, 1 / 3], dtype=torch.float64))
        for a in strength(round, 6, 6):
            w.grad = a * torch.tensor([1.0, 3.0], dtype=torch.float64) * (w.detach() - 0.2)
            adam.step()
    np.testing.assert_allclose(server.model, w.detach(), rtol=1e-10)
    assert server["adam_steps"] == 12


@pytest.mark.parametrize("finetuned", [True, False])
def test_which_model_is_broadcast(finetuned):
    algorithm = FedKA(**SMALL, broadcast_finetuned=finetuned)
    server, sent = serve(algorithm, rounds=2)
    mean = np.array([5 / 3, 1 / 3])
    assert np.allclose(sent[1], mean, rtol=1e-12, atol=0) != finetuned
    assert np.abs(server.model - mean).max() > 1e-4  # what is tested is fine-tuned
    after = algorithm.downlink(server, 0)["model"]
    assert np.array_equal(after, server.model) == finetuned


def test_without_votes_the_server_takes_the_mean():
    server, _ = serve(FedKA(**SMALL, voting=False))
    np.testing.assert_allclose(server.model, [5 / 3, 1 / 3], rtol=1e-12)


# ---- runs ----------------------------------------------------------------------------------------


class AdamAvg(FedAvg):
    """FedAvg with steps of Adam over the batches that FedKA draws."""

    def client_begin(self, payload, client):
        work = super().client_begin(payload, client)
        client.rng.integers(12, size=(8, 8))  # FedKA draws its target batches
        return replace(work, spec=replace(work.spec, adam=ADAM))

    def data_view(self, client):
        return FedKA(**SMALL, align=False).data_view(client)


def test_without_all_three_it_is_fedavg_on_the_sources():
    plain = {"adversarial": False, "align": False, "voting": False}
    run = player(**plain)
    ours = play(run, 3)[-1]
    options = {"local_lr": 3e-4, "lr_decay": 1.0, "weight_decay": 0.0, "clip": None}
    other = simulation(AdamAvg(weighting="uniform", **options), "mlp", **TARGET)
    theirs = play(other, 3)[-1]
    assert run.layout.numel - theirs.size == (64 + 1) * 32 + (32 + 1) * 2  # the domain head
    np.testing.assert_array_equal(ours[: theirs.size], theirs)
    initial = run.trainer.initial
    np.testing.assert_array_equal(ours[theirs.size :], initial[theirs.size :])


def test_target_is_sent_once_and_its_labels_play_no_part():
    run = player()
    first, second = run.step(), run.step()
    assert first.bytes_down - second.bytes_down == 2 * 12 * 4 * 4  # 12 examples of 4 floats, twice
    assert first.bytes_up == second.bytes_up
    data = blobs()
    labels = data.y_train.copy()
    labels[24:] = 0
    hidden = simulation(FedKA(**SMALL), "mlp", replace(data, y_train=labels), **TARGET)
    assert np.array_equal(play(hidden, 2)[-1], run.server.model)


def test_clients_do_not_keep_anything_that_changes():
    run = player()
    run.step()
    assert {key for state in run.clients.states.values() for key in state} == {"target"}


def test_server_without_target_examples_is_refused():
    with pytest.raises(InvalidInputError, match="examples of the target domain"):
        simulation(FedKA(**SMALL), "mlp").step()
    with pytest.raises(InvalidInputError, match="accumulate: expected a divisor of batches=32"):
        FedKA(accumulate=5)
    with pytest.raises(InvalidInputError, match="matching"):
        FedKA(matching="first")


def on_the_last_domain(algorithm, rounds):
    """Accuracy on the domain without labels, mean of the last three rounds."""
    data = load_dataset("digits-domains")
    own = data.groups_test == 3
    data = replace(
        data, x_test=data.x_test[own], y_test=data.y_test[own], groups_test=data.groups_test[own]
    )
    target = {"without": (3,), "server_examples": np.flatnonzero(data.groups_train == 3)}
    run = simulation(algorithm, "mlp:32", data, rounds=rounds, **target)
    return np.mean([run.step().accuracy for _ in range(rounds)][-3:])


@pytest.mark.slow
def test_matching_features_helps_the_domain_without_labels():
    options = {"rounds": 30, "local_lr": 1e-3, "adversarial": False, "voting": False}
    matched = on_the_last_domain(FedKA(**options), 30)
    sources_only = on_the_last_domain(FedKA(align=False, **options), 30)
    assert matched > sources_only + 0.01
