"""FedAvg: rounds by hand, and the identities that must hold in the engine."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from flcore.algorithms import FedAvg, StepSpec, available, create, local_steps
from flcore.errors import InvalidInputError
from toy_problem import CURVATURE, OPTIMUM, Toy
from toy_problem import PLAIN as OPTIONS

PLAIN = FedAvg(**OPTIONS)


def toy_run(algorithm: FedAvg, rounds: int, steps=(2, 2)) -> list[np.ndarray]:
    return Toy(algorithm, steps).rounds(rounds)


def test_two_rounds_by_hand():
    models = toy_run(replace(PLAIN, weighting="uniform"), 2)
    np.testing.assert_allclose(models, [[-0.16, 0.19], [-0.264, 0.32775]], atol=1e-12)


def test_clients_weighted_by_examples_with_unequal_steps():
    models = toy_run(replace(PLAIN, weighting="examples"), 2, steps=(2, 4))
    expected = [[-0.522425, 0.51585], [-0.722291744375, 0.85222288875]]
    np.testing.assert_allclose(models, expected, atol=1e-12)


def test_fixed_point_is_not_the_optimum():
    model = toy_run(replace(PLAIN, weighting="uniform"), 2000)[-1]
    # closed form: the optimum of the quadratics weighted by 1 - (1 - lr a)^K instead of a
    pull = 1 - (1 - 0.1 * CURVATURE) ** 2
    np.testing.assert_allclose(model, (pull * OPTIMUM).sum(0) / pull.sum(0), atol=1e-9)
    np.testing.assert_allclose(model, [-0.457142857, 0.690909091], atol=1e-9)


def test_server_lr_scales_the_mean_update():
    half = toy_run(replace(PLAIN, weighting="uniform", server_lr=0.5), 1)[0]
    np.testing.assert_allclose(half, [-0.08, 0.095], atol=1e-12)


def test_gradient_is_clipped_before_the_decay_is_added():
    x = np.array([[1.0, 0.0]])
    spec = StepSpec(lr=0.1, decay=0.5, clip=5.0)
    local_steps(x, lambda x, k: np.array([[30.0, 40.0]]), [spec], [1])
    # clipped to (3, 4), then decay (0.5, 0) on top
    np.testing.assert_allclose(x, [[1 - 0.1 * 3.5, -0.1 * 4.0]], rtol=1e-15)


def test_the_whole_bracket_is_clipped_in_full_mode():
    x = np.array([[2.0, 0.0]])
    spec = StepSpec(lr=0.1, decay=0.5, clip=5.0, clip_mode="full")
    local_steps(x, lambda x, k: np.array([[29.0, 40.0]]), [spec], [1])
    # the gradient and the decay are (30, 40) together, clipped to (3, 4)
    np.testing.assert_allclose(x, [[2 - 0.1 * 3.0, -0.1 * 4.0]], rtol=1e-15)


def test_learning_rate_decays_by_round():
    algorithm = FedAvg(local_lr=0.2, lr_decay=0.5)
    assert [algorithm.lr(t) for t in range(3)] == [0.2, 0.1, 0.05]
    run = Toy(algorithm)
    run.play()
    work = algorithm.client_begin(algorithm.downlink(run.server, 0), run.client(0))
    assert work.spec.lr == 0.1


def test_available_and_create_agree():
    assert available()["fedavg"] is FedAvg
    assert create("FedAvg", local_lr=0.3) == FedAvg(local_lr=0.3)
    assert json.loads(json.dumps(FedAvg().to_dict()))["name"] == "fedavg"
    with pytest.raises(InvalidInputError, match=r"no 'fedprox2'; choose one of: .*fedavg, "):
        create("fedprox2")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("local_lr", 0.0),
        ("local_lr", float("nan")),
        ("lr_decay", -1.0),
        ("local_epochs", 0),
        ("batch_size", 2.5),
        ("weight_decay", -1e-3),
        ("clip", 0.0),
        ("server_lr", float("inf")),
        ("weighting", "median"),
    ],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(InvalidInputError, match=f"{option}: expected"):
        FedAvg(**{option: value})


# ---- identities, in the engine ----


def one_round(partition, algorithm, **settings):
    """Model before and after one round with every client and nothing compressed."""
    simulation = pytest.importorskip("flcore.simulation")
    pytest.importorskip("torch")
    n = len(partition)
    run = simulation.Simulation(
        algorithm,
        "mlp",
        "digits",
        simulation.Settings(
            rounds=1, clients=n, participation=n, codec=None, feedback=None, **settings
        ),
        partition=partition,
    )
    before = run.history.model
    run.step()
    return run, before, run.history.model


def test_one_full_batch_step_of_all_clients_is_one_central_step():
    torch = pytest.importorskip("torch")
    order = np.random.default_rng(0).permutation(600)
    partition = np.split(order, [50, 250])  # unequal clients: the weights matter
    algorithm = FedAvg(local_epochs=1, batch_size=1000, clip=None, weighting="examples")
    run, before, after = one_round(partition, algorithm)

    names = list(before)
    w = {name: torch.tensor(before[name], requires_grad=True) for name in names}
    x = torch.from_numpy(run.data.x_train[order]).flatten(1)
    hidden = torch.relu(x @ w[names[0]].T + w[names[1]])
    scores = hidden @ w[names[2]].T + w[names[3]]
    loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(run.data.y_train[order]))
    loss.backward()
    for name in names:
        step = w[name].grad.numpy() + algorithm.weight_decay * before[name]
        np.testing.assert_allclose(after[name], before[name] - 0.1 * step, rtol=0, atol=2e-7)


def test_identical_clients_give_the_local_run_of_one():
    algorithm = FedAvg(local_epochs=5)
    _, _, alone = one_round([np.array([7])], algorithm)
    _, _, together = one_round([np.array([7])] * 4, algorithm)
    for name in alone:
        np.testing.assert_allclose(together[name], alone[name], rtol=0, atol=1e-7)


def test_order_of_clients_changes_no_bit_of_a_reproducible_mean():
    algorithm = FedAvg(local_epochs=3)
    clients = [np.array([i]) for i in (3, 14, 15, 92, 65)]
    _, _, model = one_round(clients, algorithm, accumulate="reproducible")
    _, _, other = one_round(clients[::-1], algorithm, accumulate="reproducible")
    for name in model:
        np.testing.assert_array_equal(model[name], other[name])
