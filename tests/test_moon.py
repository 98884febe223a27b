"""MOON: FedAvg where it must be, the models that a client keeps, features that stay near."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from algorithm_problem import PLAIN, blobs, play, simulation
from flcore.algorithms import FedAvg, Layout, LocalResult, LocalWork, Moon, Server, StepSpec
from flcore.algorithms.moon import Contrast
from flcore.errors import InvalidInputError
from flcore.losses import model_contrastive_loss
from flcore.simulation import Settings, Simulation, run
from toy_problem import PLAIN as TOY
from toy_problem import Toy


def test_mu_0_is_fedavg_bitwise():
    ours = play(simulation(Moon(mu=0.0, local_momentum=0.0, **PLAIN), "mlp-projection"), 3)
    theirs = play(simulation(FedAvg(**PLAIN), "mlp-projection"), 3)
    np.testing.assert_array_equal(ours, theirs)


def test_first_round_is_fedavg_and_the_second_is_not():
    """The loss is summed in another order than torch's mean, so equal to rounding."""
    ours = play(simulation(Moon(mu=5.0, local_momentum=0.0, **PLAIN), "mlp-projection"), 2)
    theirs = play(simulation(FedAvg(**PLAIN), "mlp-projection"), 2)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=2e-6)
    assert np.abs(ours[1] - theirs[1]).max() > 1e-3


def test_contrast_adds_nothing_before_there_is_a_last_model():
    """Bitwise: the gradient with mu is the gradient without."""
    layer = torch.nn.Linear(4, 3)
    x, y, weight = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), torch.full((5,), 0.2)

    def forward(x, parameters=None, *, features=False):
        return x @ layer.weight.T, layer(x)

    aux = {"global": torch.zeros(1), "previous": torch.zeros(2, 1), "known": torch.zeros(2)}
    slopes = []
    for mu in (0.0, 5.0):
        loss = Contrast(mu, 0.5)(forward, x, y, weight, aux)
        slopes.append(torch.autograd.grad(loss, layer.weight)[0])
    assert torch.equal(*slopes)


def test_loss_of_a_batch_is_cross_entropy_plus_mu_times_the_contrast():
    """One example with three known feature vectors: the contrast is 0.2632824673."""
    vectors = {None: [1.0, 0.0], 0: [0.6, 0.8], 1: [0.0, 1.0]}

    def forward(x, parameters=None, *, features=False):
        key = None if parameters is None else int(parameters)
        return torch.tensor([vectors[key]], dtype=torch.float64), torch.zeros(1, 4)

    aux = {"global": torch.tensor(0), "previous": torch.tensor([1]), "known": torch.ones(1)}
    loss = Contrast(2.0, 0.5)(forward, torch.zeros(1, 1), torch.tensor([0]), torch.ones(1), aux)
    assert loss.item() == pytest.approx(np.log(4) + 2 * 0.2632824673, abs=1e-7)


@pytest.mark.parametrize("buffer", [1, 2, 3])
def test_client_keeps_its_last_models_newest_first(buffer):
    algorithm, toy = Moon(buffer=buffer), Toy(FedAvg(**TOY))
    layout, client = Layout({"w": (2,)}), toy.client(0)
    for round in range(5):
        work = LocalWork(np.zeros(2), StepSpec(lr=0.1))
        algorithm.client_end(LocalResult(work, np.full(2, float(round)), 1, 0.0), client)
    np.testing.assert_array_equal(client.state["previous"][:, 0], [4.0, 3.0, 2.0][:buffer])
    payload = algorithm.downlink(Server(np.full(2, 9.0), layout, 2, 2), 0)
    aux = algorithm.client_begin(payload, client).aux
    np.testing.assert_array_equal(aux["previous"], client.state["previous"])
    np.testing.assert_array_equal(aux["known"], np.ones(buffer))
    np.testing.assert_array_equal(aux["global"], [9.0, 9.0])


def test_absent_client_keeps_its_stale_model():
    options = PLAIN | {"local_lr": 0.01}
    run = simulation(Moon(**options), "mlp-projection", participation=1)
    seen = {}
    for _ in range(4):
        record = run.step()
        (client,) = record.clients
        now = {id: state["previous"][0] for id, state in run.clients.states.items() if state}
        for other, model in seen.items():
            assert other == client or np.array_equal(now[other], model)
        seen = {id: model.copy() for id, model in now.items()}
    assert len(seen) > 1


def test_damped_server_momentum():
    """v = 0.9 v + 0.1 u: the first step is a tenth of FedAvg's (-0.16, 0.19)."""
    toy = Toy(
        Moon(mu=0.0, weighting="uniform", server_momentum=0.9, **(TOY | {"local_momentum": 0}))
    )
    np.testing.assert_allclose(toy.play(), [-0.016, 0.019], rtol=1e-12)
    before, v = toy.server.model.copy(), toy.server["velocity"].copy()
    plain = Toy(FedAvg(weighting="uniform", **TOY))
    plain.server.model = before.copy()
    step = plain.play() - before
    np.testing.assert_allclose(toy.play() - before, 0.9 * v + 0.1 * step, rtol=1e-12)


def test_frozen_models_leave_statistics_alone():
    """With mu = 0 in the loss, running statistics are those of FedBN without anything kept."""
    from flcore.algorithms import FedBN

    tiny = Moon(mu=1e-30, local_momentum=0.0, weighting="uniform", **PLAIN)
    ours = play(simulation(tiny, "mlp-bn"), 3)
    theirs = play(simulation(FedBN(keep="nothing", **PLAIN), "mlp-bn"), 3)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_options_are_checked():
    for option, value in {"mu": -1, "temperature": 0, "buffer": 0, "server_momentum": 1}.items():
        with pytest.raises(InvalidInputError, match=option):
            Moon(**{option: value})


def test_what_the_contrast_draws_to():
    """Only cos(z, z_g) - cos(z, z_p) counts, so z ends along the difference of the directions.

    Where both models nearly agree, that is away from both: cos(z, z_g) = sin(angle / 2).
    """
    angle = 0.4
    towards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    away = torch.tensor([[np.cos(angle), np.sin(angle)]], dtype=torch.float64)
    z = torch.tensor([[1.0, 0.1]], dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        (slope,) = torch.autograd.grad(model_contrastive_loss(z, towards, away), z)
        z = (z - 0.1 * slope).detach().requires_grad_()
    cosine = torch.cosine_similarity(z, towards).item()
    assert cosine == pytest.approx(np.sin(angle / 2), abs=1e-6)


def margin(algorithm, seed):
    """Mean of cos(z, z_g) - cos(z, z_p) over the clients' examples after some rounds; accuracy."""
    settings = Settings(
        rounds=8, clients=10, participation=10, alpha=0.5, seed=seed, codec=None, feedback=None
    )
    run = Simulation(algorithm, "mlp-projection", "digits", settings)
    play(run, settings.rounds - 1)
    before = run.server.model.copy()
    last = {i: state["previous"][0].copy() for i, state in run.clients.states.items()}
    accuracy, margins = run.step().accuracy, []
    for id, previous in last.items():
        client = run.clients.client(id, settings.rounds)
        models = (client.state["previous"][0], before, previous)
        z, *others = (torch.from_numpy(client.tools.features(m)) for m in models)
        near, far = (torch.cosine_similarity(z, other).mean().item() for other in others)
        margins.append(near - far)
    return np.mean(margins), accuracy


@pytest.mark.slow
def test_features_are_nearer_to_the_global_ones_than_to_the_last_ones():
    """By more than under FedAvg, which mu = 1e-30 is, with the models kept for the comparison."""
    options = {"local_epochs": 5, "batch_size": 32}
    for seed in range(2):
        contrast = margin(Moon(mu=5.0, **options), seed)
        plain = margin(Moon(mu=1e-30, **options), seed)
        assert contrast[0] > plain[0] + 0.5
        assert contrast[1] > plain[1] - 0.02


def test_runs_by_name():
    options = {"codec": None, "feedback": None}
    history = run(
        "moon", "mlp-projection", blobs(), Settings(rounds=1, clients=3, participation=3, **options)
    )
    assert len(history) == 1
