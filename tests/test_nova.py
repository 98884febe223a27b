"""FedNova: normalisers by hand, closed forms against the recursion, two quadratics, momentum."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation import FedNova, Mean, NovaSteps, nova_normalizer, nova_weights
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from support import HAS_TORCH

A, B = np.array([[1, 2], [3, 1.0]]), np.array([[1, 0], [-1, 2.0]])  # f_i = sum a_i (w - b_i)^2 / 2


def recursion(steps, rho, mu, lr):
    count = NovaSteps(rho, mu)
    for _ in range(steps):
        count.step(lr)
    assert count.steps == steps
    return count.normalizer


def quadratics(rounds, *, rho=0.0, mu=0.0, lr=0.1, gamma=0.0, nova=True):
    """Two clients of 1 and 3 examples that take 2 and 4 local steps; the model of each round."""
    server, w, models = FedNova(momentum=gamma), np.zeros(2), []
    for _ in range(rounds):
        updates, counts = [], []
        for a, b, steps in zip(A, B, (2, 4), strict=True):
            x, buffer, count = w.copy(), np.zeros(2), NovaSteps(rho, mu)
            for _ in range(steps):
                buffer = rho * buffer + a * (x - b)
                x = x - lr * (buffer + mu * (x - w))
                count.step(lr)
            updates.append(x - w)
            counts.append(count)
        w = server.step(
            w,
            updates,
            examples=[1, 3],
            normalizers=[c.normalizer for c in counts] if nova else [1, 1],
            steps=[c.steps for c in counts] if mu and nova else None,
            lr=lr,
        )
        models.append(w)
    return models, [c.normalizer for c in counts]


# ---- normalisers -------------------------------------------------------------------------------


def test_normalisers_by_hand():
    np.testing.assert_array_equal(nova_normalizer([1, 2, 7]), [1, 2, 7])
    np.testing.assert_allclose(nova_normalizer(5, momentum=0.9), 13.1441, rtol=1e-13)
    np.testing.assert_allclose(nova_normalizer(5, proximal=0.1, lr=0.1), 4.90099501, rtol=1e-13)
    np.testing.assert_allclose(nova_normalizer([2, 4], momentum=0.9), [2.9, 9.049], rtol=1e-14)
    np.testing.assert_allclose(
        nova_normalizer([2, 4], proximal=0.5, lr=0.1), [1.95, 3.709875], rtol=1e-14
    )
    assert nova_normalizer(9, proximal=10.0, lr=0.1) == 1.0  # only the last step is left


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("mu", [0.0, 1e-9, 0.1, 5.0])
def test_closed_forms_agree_with_the_recursion(rho, mu):
    steps = [1, 2, 3, 10, 57, 400]
    want = [recursion(k, rho, mu, 0.1) for k in steps]
    got = nova_normalizer(steps, momentum=rho, proximal=mu, lr=0.1)
    np.testing.assert_allclose(got, want, rtol=1e-11)
    assert got[0] == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(("rho", "mu"), [(0.0, 0.0), (0.9, 0.0), (0.0, 2.0), (0.9, 2.0)])
def test_the_normaliser_is_the_change_a_constant_gradient_of_one_makes(rho, mu):
    lr, x, buffer = 0.05, 0.0, 0.0
    for _ in range(13):
        buffer = rho * buffer + 1.0
        x -= lr * (buffer + mu * x)
    want = -x / lr
    np.testing.assert_allclose(
        nova_normalizer(13, momentum=rho, proximal=mu, lr=lr), want, rtol=1e-13
    )


def test_steps_of_changing_rates_and_a_new_round():
    count = NovaSteps(0.5, 2.0)
    for lr in (0.1, 0.2):
        count.step(lr)
    assert count.normalizer == pytest.approx((1 - 0.4) * 1 + 1.5)
    count.reset()
    count.step(0.1)
    assert (count.steps, count.normalizer) == (1, 1.0)


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (0, {}, "steps: expected a finite number from 1, got 0"),
        ([2, 2.5], {}, "steps: expected whole numbers, got 2.5"),
        (2, {"momentum": 1.0}, r"momentum: expected a finite number in \[0, 1\), got 1.0"),
        (2, {"proximal": 0.1}, "lr: expected the learning rate"),
        (2, {"proximal": -0.1, "lr": 0.1}, "proximal"),
        (2, {"proximal": 11, "lr": 0.1}, r"lr \* proximal: .* got 1.1"),
        ("many", {}, "steps: expected numbers"),
    ],
)
def test_wrong_arguments_of_the_normaliser_are_named(steps, options, message):
    with pytest.raises(InvalidInputError, match=message):
        nova_normalizer(steps, **options)


# ---- the step ----------------------------------------------------------------------------------


def test_weights_and_step_by_hand():
    updates = [np.array([-0.2, 0]), np.array([0, -0.6])]
    np.testing.assert_array_equal(nova_weights([1, 3], [2, 6]), [0.625, 0.625])  # tau_eff = 5
    step = FedNova().step(np.zeros(2), updates, [1, 3], [2, 6])
    np.testing.assert_allclose(step, [-0.125, -0.375], rtol=1e-15)
    np.testing.assert_allclose(Mean()(updates, [1, 3]), [-0.05, -0.45])
    np.testing.assert_allclose(nova_weights([1, 3], [1.95, 3.709875], [2, 4]) @ [1.95, 0], 0.875)


def test_equal_normalisers_are_fedavg(rng):
    x = {"w": rng.standard_normal((3, 5)), "b": rng.standard_normal(7)}
    updates = [{k: rng.standard_normal(v.shape) for k, v in x.items()} for _ in range(4)]
    got = FedNova().step(x, updates, [3, 1, 4, 1], [2.5] * 4)
    mean = Mean()(updates, [3, 1, 4, 1])
    for k in x:
        np.testing.assert_allclose(got[k], x[k] + mean[k], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "normalizers", "want"),
    [
        (
            {},
            (2, 4),
            [(-0.415559375, 0.45136875), (-0.5893424097558594, 0.7297800476367189)],
        ),
        (
            {"rho": 0.9},
            (2.9, 9.049),
            [(-0.8414719479386177, 0.9627724223671124), (-0.6697206612993107, 1.125412484581085)],
        ),
        (
            {"mu": 0.5},
            (1.95, 3.709875),
            [(-0.41521446140368623, 0.4509526938239159), (-0.5890896267309558, 0.7294035229047834)],
        ),
        (
            {"nova": False},
            (2, 4),
            [(-0.522425, 0.51585), (-0.722291744375, 0.85222288875)],
        ),
    ],
)
def test_two_quadratics_by_hand(options, normalizers, want):
    models, counted = quadratics(2, **options)
    np.testing.assert_allclose(models, want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(counted, normalizers, rtol=1e-14)


def test_small_steps_lead_to_the_true_optimum_and_fedavg_does_not():
    optimum = np.array([-0.8, 1.2])
    nova = quadratics(1000, lr=0.005)[0][-1]
    fedavg = quadratics(1000, lr=0.005, nova=False)[0][-1]
    assert np.linalg.norm(nova - optimum) < 0.005
    assert np.linalg.norm(fedavg - optimum) > 0.25


def test_server_momentum_follows_its_recursion(rng):
    w, plain = np.zeros(3), FedNova(accumulate="float64")
    server, buffer = FedNova(momentum=0.7, accumulate="float64"), np.zeros(3)
    x = w.copy()
    for lr in (0.1, 0.1, 0.02):
        updates, normalizers = rng.standard_normal((2, 3)), [2, 5.0]
        change = plain.step(np.zeros(3), updates, [1, 2], normalizers)
        buffer = 0.7 * buffer + change / lr
        x = x + lr * buffer
        w = server.step(w, updates, [1, 2], normalizers, lr=lr)
        np.testing.assert_allclose(w, x, rtol=1e-13)
        np.testing.assert_allclose(server.buffer, buffer, rtol=1e-13)
    first, second = quadratics(1, gamma=0.9)[0], quadratics(1)[0]
    np.testing.assert_allclose(first, second, rtol=1e-14)


def test_state_goes_on_where_it_was(rng):
    x = {"w": np.zeros(5, np.float32)}
    rounds = [[{"w": rng.standard_normal(5).astype(np.float32)} for _ in range(2)] for _ in "abc"]
    first, second = FedNova(momentum=0.5), FedNova(momentum=0.5)
    assert first.state_dict() == {"buffer": None}
    x = first.step(x, rounds[0], [1, 1], [1, 2])
    state = first.state_dict()
    y = first.step(x, rounds[1], [1, 1], [1, 2])
    second.load_state_dict(state)
    z = second.step(x, rounds[1], [1, 1], [1, 2])
    assert y["w"].tobytes() == z["w"].tobytes() and y["w"].dtype == np.float32
    with pytest.raises(InvalidInputError, match="expected None without momentum"):
        FedNova().load_state_dict(state)
    with pytest.raises(InvalidInputError, match="expected the keys"):
        second.load_state_dict({})
    with pytest.raises(InvalidInputError, match=r"buffer\['w'\]: expected shape"):
        second.step({"w": x["w"][:4]}, [{"w": x["w"][:4]}], [1], [1])
    with pytest.raises(NonFiniteError):
        second.load_state_dict({"buffer": np.array([np.nan])})
    assert second.buffer["w"].tobytes() == first.buffer["w"].tobytes()


def test_out_may_be_the_model(rng):
    x, updates = rng.standard_normal(10), rng.standard_normal((2, 10))
    for momentum in (0.0, 0.9):
        want = FedNova(momentum=momentum).step(x, updates, [1, 2], [3, 4])
        y = x.copy()
        assert FedNova(momentum=momentum).step(y, updates, [1, 2], [3, 4], out=y) is y
        assert y.tobytes() == want.tobytes()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_client_that_is_left_out_changes_shares_and_effective_steps(momentum, rng):
    x, updates = rng.standard_normal(4), rng.standard_normal((3, 4))
    updates[1, 2] = np.inf
    with pytest.raises(NonFiniteError, match=r"updates\[1\]"):
        FedNova(momentum=momentum).step(x, updates, [1, 2, 3], [2, 3, 4])
    server = FedNova(momentum=momentum, nonfinite="exclude")
    got = server.step(x, updates, [1, 2, 3], [2, 3, 4])
    want = FedNova().step(x, updates[[0, 2]], [1, 3], [2, 4])
    np.testing.assert_allclose(got, want, rtol=1e-13)
    buffer = server.buffer
    with pytest.raises(NonFiniteError, match="no client of positive weight"):
        server.step(x, updates, [0, 1, 0], [2, 3, 4])
    with pytest.raises(NonFiniteError, match=r"^model: NaN"):
        server.step(x * np.nan, updates, [1, 2, 3], [2, 3, 4])
    assert server.buffer is buffer


def test_wrong_arguments_of_the_step_are_named():
    x, updates = np.zeros(2), np.ones((2, 2))
    step = FedNova().step
    for arguments, options, message in (
        (([1, 1], [1, 0]), {}, r"normalizers\[1\]: expected a number above 0"),
        (([1, 1, 1], [1, 1, 1]), {}, "expected 2 values"),
        (([1], [1, 1]), {}, "examples: expected 2 values"),
        (([1, -1], [1, 1]), {}, r"examples\[1\]"),
        (([1, 1], [1, 1]), {"steps": [1]}, "steps: expected shape"),
        (([1, 1], [1, 1]), {"lr": -1}, "lr"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            step(x, updates, *arguments, **options)
    with pytest.raises(DTypeError, match="model"):
        step([1, 2], updates, [1, 1], [1, 1])
    for options in ({"momentum": 1.0}, {"accumulate": "int"}, {"nonfinite": "drop"}):
        with pytest.raises(InvalidInputError, match=next(iter(options))):
            FedNova(**options)


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
def test_torch_models_stay_torch():
    import torch

    server, x = FedNova(momentum=0.5), [torch.zeros(3, dtype=torch.bfloat16)]
    for want in (0.5, 1.25):
        x = server.step(x, [[torch.ones(3, dtype=torch.bfloat16) / 2]], [1], [3])
        assert x[0].dtype == torch.bfloat16 and x[0].tolist() == [want] * 3
