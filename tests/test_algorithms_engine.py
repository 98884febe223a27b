"""Algorithms in the engine: what they send, and what stays true of their states in float32."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from flcore.algorithms import create
from flcore.simulation import Observer, Settings, Simulation, load_dataset, run

PARAMETERS, CLIENTS, PARTICIPANTS = 4810, 12, 4

# vectors as long as the model that a participant gets and sends, in the rounds after the first
VECTORS: dict[str, tuple[int, int]] = {
    "fedavg": (1, 1),
    "fedprox": (1, 1),
    "fednova": (1, 1),
    "fedavgm": (1, 1),
    "fedadam": (1, 1),
    "fedsam": (1, 1),
    "feddyn": (1, 1),
    "fedspeed": (1, 1),
    "scaffold": (2, 1),
    "fedgamma": (2, 1),
    "fedcm": (2, 1),
    "mofedsam": (2, 1),
    "fedgps": (2, 1),
    "fedsmoo": (2, 2),
}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits").limited(360)


def simulation(data, name, execution="auto", **options):
    settings = Settings(
        rounds=4,
        clients=CLIENTS,
        participation=PARTICIPANTS,
        codec=None,
        feedback=None,
        execution=execution,
    )
    algorithm = create(name, **{"local_epochs": 2, "weighting": "uniform", **options})
    return Simulation(algorithm, "mlp", data, settings)


@pytest.mark.parametrize("name", VECTORS)
def test_messages_are_as_long_as_the_method_needs(name, digits):
    run = simulation(digits, name)
    first, *_, last = (run.step() for _ in range(3))
    assert last.loss < first.loss + 0.5
    for size, vectors in zip((last.bytes_down, last.bytes_up), VECTORS[name], strict=True):
        rest = size - vectors * PARTICIPANTS * 4 * PARAMETERS
        assert 0 <= rest < 200 * PARTICIPANTS  # names and numbers


def test_full_gradients_and_paper_forms_in_the_engine(digits):
    run = simulation(digits, "scaffold", option="I")
    record = run.step()
    assert record.bytes_up > 2 * PARTICIPANTS * 4 * PARAMETERS
    # c_i is the gradient of the client's whole data at the model of the start
    client = record.clients[0]
    own = run.partition[client]
    x = torch.from_numpy(digits.x_train[own]).flatten(1)
    y = torch.from_numpy(digits.y_train[own])
    shapes = run.layout.named(run.trainer.initial)
    w = [torch.tensor(value, requires_grad=True) for value in shapes.values()]
    scores = torch.relu(x @ w[0].T + w[1]) @ w[2].T + w[3]
    torch.nn.functional.cross_entropy(scores, y).backward()
    expected = np.concatenate([tensor.grad.numpy().ravel() for tensor in w])
    control = run.clients.states[client]["control"]
    np.testing.assert_allclose(control, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "kept", "options"),
    [
        ("scaffold", "control", {}),
        ("scaffold", "control", {"option": "I"}),
        ("fedgamma", "control", {}),
        ("feddyn", "dual", {}),
        ("feddyn", "dual", {"weighting": "examples"}),
        ("fedspeed", "dual", {}),
        ("fedsmoo", "dual", {}),
    ],
)
def test_the_server_holds_the_mean_of_what_clients_hold(name, kept, options, digits):
    run = simulation(digits, name, **options)
    for _ in range(4):
        run.step()
    mine = sum(state[kept] for state in run.clients.states.values() if kept in state) / CLIENTS
    scale = np.abs(mine).max()
    np.testing.assert_allclose(run.server[kept], mine, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("name", "options", "other"),
    [
        ("fedprox", {"mu": 0.0}, "fedavg"),
        ("fedsam", {"rho": 0.0}, "fedavg"),
        ("fedcm", {"alpha": 1.0}, "fedavg"),
        ("fedavgm", {"beta": 0.0}, "fedavg"),
        ("fedgps", {"rho": 0.0}, "fedavg"),
        ("fedspeed", {"rho": 0.0}, "feddyn"),
        ("fedsmoo", {"rho": 0.0}, "feddyn"),
        ("fedgamma", {"rho": 0.0}, "scaffold"),
    ],
)
def test_reductions_hold_to_the_last_bit_in_training(name, options, other, digits):
    mine, theirs = simulation(digits, name, **options), simulation(digits, other)
    for _ in range(3):
        mine.step()
        theirs.step()
    np.testing.assert_array_equal(mine.server.model, theirs.server.model)


@pytest.mark.parametrize(
    ("name", "options", "other", "others"),
    [
        ("fednova", {"weighting": "examples"}, "fedavg", {"weighting": "examples"}),
        ("scaffold", {"weighting": "examples"}, "scaffold", {}),
        ("feddyn", {"weighting": "examples"}, "feddyn", {}),
    ],
)
def test_equal_clients_are_alike_under_an_error_control_too(name, options, other, others, digits):
    """It keeps what all clients hold, in units of their weights."""
    settings = Settings(rounds=3, clients=CLIENTS, participation=PARTICIPANTS)
    mine, theirs = (
        run(create(n, local_epochs=1, **more), "mlp", digits, settings).model
        for n, more in ((name, options), (other, others))
    )
    for tensor in mine:
        np.testing.assert_allclose(mine[tensor], theirs[tensor], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in VECTORS),
        ("fedprox", {"mu": 0.5, "form": "direct"}),
        ("fednova", {"mu": 0.1}),
        ("fedspeed", {"merge": 0.5}),
        ("fedspeed", {"normalised": False, "server_term": "active"}),
        ("fedsam", {"adaptive": True}),
        ("scaffold", {"option": "I", "weighting": "examples"}),
    ],
)
def test_clients_trained_together_or_in_turn_give_the_same(name, options, digits):
    together = simulation(digits, name, "batched", **options)
    in_turn = simulation(digits, name, "sequential", **options)
    for _ in range(2):
        together.step()
        in_turn.step()
    np.testing.assert_allclose(together.server.model, in_turn.server.model, rtol=0, atol=1e-5)
    for client, state in in_turn.clients.states.items():
        for kept, value in state.items():
            other = together.clients.states[client][kept]
            scale = 1 + np.abs(value).max()  # control variates are gradients
            np.testing.assert_allclose(other, value, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("scaffold", {"option": "I"}),
        ("feddyn", {"weighting": "examples"}),
        ("fedsmoo", {}),
        ("fedcm", {}),
        ("fedgps", {}),
        ("fedyogi", {}),
        ("fednova", {"server_momentum": 0.9}),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(name, options, digits, tmp_path):
    class Stop(Observer):
        def should_stop(self):
            return True

    algorithm = create(name, local_epochs=1, **options)
    settings = Settings(rounds=4, clients=6, participation=4, codec=None, feedback=None)
    whole = run(algorithm, "mlp", digits, settings)
    for _ in range(3):
        part = run(
            algorithm, "mlp", digits, settings, output=tmp_path / "a", resume=True, observer=Stop()
        )
        assert len(part) < 4
    rest = run(algorithm, "mlp", digits, settings, output=tmp_path / "a", resume=True)
    assert [r.accuracy for r in rest] == [r.accuracy for r in whole]
    for tensor in whole.model:
        np.testing.assert_array_equal(rest.model[tensor], whole.model[tensor])
