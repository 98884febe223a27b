"""FedGPS with its goal: surrogates, the loss of a batch by hand, prototypes, reductions."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from algorithm_problem import PLAIN, play, simulation
from flcore.algorithms import FedAvg, FedGPS, FedGPSGoal
from flcore.algorithms.fedgps_goal import Goal, surrogates
from flcore.errors import InvalidInputError
from flcore.losses import supervised_contrastive_loss
from flcore.simulation.heads import widen_head

OFF = {
    "surrogate_weight": 0.0,
    "prototype_weight": 0.0,
    "joint_weight": 0.0,
    "surrogate_contrast": 0.0,
}
SMALL = PLAIN | {"surrogate_examples": 5, "surrogate_batch": 6}


# ---- reductions ----------------------------------------------------------------------------------


def test_without_goal_and_path_it_is_fedavg_with_momentum():
    momentum = {"local_momentum": 0.9, **(PLAIN | {"local_lr": 0.02})}
    ours = play(simulation(FedGPSGoal(rho=0.0, **OFF, **momentum), "mlp"), 3)
    theirs = play(simulation(FedAvg(weighting="uniform", **momentum), "mlp"), 3)
    np.testing.assert_array_equal(ours, theirs)


def test_without_goal_it_is_the_path():
    ours = play(simulation(FedGPSGoal(rho=0.3, **OFF, **PLAIN), "mlp"), 3)
    theirs = play(simulation(FedGPS(rho=0.3, **PLAIN), "mlp"), 3)
    np.testing.assert_array_equal(ours, theirs)


def test_path_acts_beside_the_goal():
    still, moved = (play(simulation(FedGPSGoal(rho=r, **SMALL), "mlp"), 2) for r in (0.0, 0.3))
    np.testing.assert_array_equal(still[0], moved[0])  # there is no path in the first round
    assert np.abs(still[1] - moved[1]).max() > 1e-4


# ---- surrogates ----------------------------------------------------------------------------------


def test_surrogates_are_one_gaussian_a_class_and_the_same_for_everyone():
    x, y = surrogates((1, 8, 8), 10, 200, 0.1, 3)
    assert x.shape == (2000, 1, 8, 8) and x.dtype == np.float32
    assert np.bincount(y).tolist() == [200] * 10
    means = np.stack([x[y == c].mean(0) for c in range(10)])
    assert means.std() == pytest.approx(1.0, abs=0.1)
    assert (x - means[y]).std() == pytest.approx(0.1, abs=0.005)
    surrogates.cache_clear()
    np.testing.assert_array_equal(surrogates((1, 8, 8), 10, 200, 0.1, 3)[0], x)
    assert not np.array_equal(surrogates((1, 8, 8), 10, 200, 0.1, 4)[0], x)


def test_head_is_doubled_and_its_first_half_stays():
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    wide, x = widen_head(model, 6), torch.randn(7, 4)
    torch.testing.assert_close(wide(x)[:, :3], model(x))
    assert wide[-1].out_features == 6 and model[-1].out_features == 3
    assert torch.equal(widen_head(model, 6)[-1].weight, wide[-1].weight)
    with pytest.raises(InvalidInputError, match="at most 2 outputs"):
        widen_head(model, 2)


# ---- loss ----------------------------------------------------------------------------------------


def batch():
    """Two real examples and a third that is padding; three surrogates; two classes."""
    torch.manual_seed(0)
    body, head = torch.nn.Linear(4, 3).double(), torch.nn.Linear(3, 4).double()

    def forward(x, parameters=None, *, features=False):
        z = body(x)
        return z, head(z)

    x, y = torch.randn(3, 4).double(), torch.tensor([0, 1, 1])
    weight = torch.tensor([0.5, 0.5, 0.0]).double()
    aux = {
        "surrogates": torch.randn(5, 4).double(),
        "classes": torch.tensor([0, 0, 1, 1, 1]),
        "drawn": torch.tensor([[0, 2, 3], [1, 4, 0]]),
        "prototypes": torch.randn(2, 3).double(),
        "step": 3,
    }
    return forward, body, (x, y, weight, aux)


@pytest.mark.parametrize("matched", [False, True])
def test_loss_of_a_batch_is_the_sum_of_its_terms(matched):
    forward, _, (x, y, weight, aux) = batch()
    options = FedGPSGoal(
        surrogate_weight=2.0,
        prototype_weight=0.3,
        joint_weight=0.7,
        surrogate_contrast=0.2,
        matched=matched,
        temperature=0.5,
    )
    loss = Goal(options)(forward, x, y, weight, aux)
    entropy = torch.nn.functional.cross_entropy
    classes = torch.tensor([0, 1, 0])  # step 3 sees the second batch: surrogates 1, 4, 0
    (z, scores), (z_s, scores_s) = forward(x[:2]), forward(aux["surrogates"][[1, 4, 0]])
    labels = torch.cat([y[:2], classes if matched else classes + 2])
    expected = entropy(scores, y[:2]) + 2.0 * entropy(scores_s, classes + 2)
    expected = expected + 0.3 * ((z_s - aux["prototypes"][classes]) ** 2).mean()
    joint = supervised_contrastive_loss(torch.cat([z, z_s]), labels, temperature=0.5)
    alone = supervised_contrastive_loss(z_s, classes, temperature=0.5)
    torch.testing.assert_close(loss, expected + 0.7 * joint + 0.2 * alone)


def test_joint_contrast_does_not_move_the_surrogates():
    """With the joint contrast alone the surrogates' inputs have no gradient, the real ones do."""
    forward, _, (x, y, weight, aux) = batch()
    only = {**OFF, "joint_weight": 1.0}
    aux["surrogates"].requires_grad_()
    x.requires_grad_()
    Goal(FedGPSGoal(**only))(forward, x, y, weight, aux).backward()
    assert aux["surrogates"].grad is None or not aux["surrogates"].grad.any()
    assert x.grad[:2].any() and not x.grad[2].any()  # the third is padding


def test_no_prototypes_in_the_first_round():
    forward, _, (x, y, weight, aux) = batch()
    del aux["prototypes"]
    zero, one = (
        Goal(FedGPSGoal(prototype_weight=b))(forward, x, y, weight, aux) for b in (0.0, 1.0)
    )
    assert torch.equal(zero, one)


# ---- prototypes ----------------------------------------------------------------------------------


def test_prototypes_are_the_mean_features_of_the_surrogates():
    run = simulation(FedGPSGoal(**SMALL), "mlp")
    ends = {}
    train = run.rounds_trainer.train

    def spy(jobs):
        results = train(jobs)
        ends.update({job.client: r.end.copy() for job, r in zip(jobs, results, strict=True)})
        return results

    run.rounds_trainer.train = spy
    assert "prototypes" not in run.algorithm.downlink(run.server, 0)
    run.step()
    x, y = surrogates((4,), 3, 5, 0.1, 0)
    features = [run.server.tools.features(ends[i], x) for i in range(3)]
    expected = [np.mean([f[y == c].mean(0) for f in features], 0) for c in range(3)]
    sent = run.algorithm.downlink(run.server, 0)["prototypes"]
    np.testing.assert_allclose(sent, expected, rtol=1e-5, atol=1e-6)


def test_prototypes_count_by_their_examples():
    from flcore.algorithms import Arrival, Arrivals, Layout, Server

    server = Server(np.zeros(2, np.float32), Layout({"w": (2,)}), 2, 2)
    messages = [
        {"update": np.zeros(2, np.float32), "means": np.full((1, 2), m), "counts": np.array([n])}
        for m, n in ((1.0, 1.0), (5.0, 3.0))
    ]
    arrivals = Arrivals([Arrival(i, 4, message) for i, message in enumerate(messages)])
    FedGPSGoal().server_step(server, np.zeros(2, np.float32), arrivals)
    np.testing.assert_array_equal(server["prototypes"], [[4.0, 4.0]])


def test_options_are_checked():
    bad = {"surrogate_weight": -1, "temperature": 0, "surrogate_batch": 0, "surrogate_seed": -1}
    for option, value in bad.items():
        with pytest.raises(InvalidInputError, match=option):
            FedGPSGoal(**{option: value})
