"""The comp-sum family: worked numbers, members, gradients, smooth adversarial form."""

import math

import pytest

torch = pytest.importorskip("torch")

from flcore.errors import InvalidInputError
from flcore.losses import (
    adversarial_inputs,
    comp_sum_loss,
    cross_entropy,
    generalized_cross_entropy,
    mae_loss,
    smooth_adversarial_comp_sum_loss,
    stablemax_cross_entropy,
    sum_exponential_loss,
)

H = [[2.0, 0.0, -1.0, -3.0]]
RIGHT = {0: 0.191860298604, 0.5: 0.183447089905, 1: 0.175515362617, 1.5: 0.168034380822,
         2: 0.160975492537}  # fmt: skip
WRONG = {0: 175.8877521247, 0.5: 24.5998309863, 1: 5.1755153626, 1.5: 1.8496231047,
         2: 0.9943466973}  # fmt: skip
GRADIENTS = {
    0: [-0.191860298604, 0.135335283237, 0.049787068368, 0.006737946999],
    2: [-0.13506238334, 0.095270913456, 0.035048210402, 0.004743259482],
}


@pytest.mark.parametrize(("label", "values"), [(0, RIGHT), (3, WRONG)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_values(label, values, dtype):
    h = torch.tensor(H, dtype=dtype)
    for tau, value in values.items():
        loss = comp_sum_loss(h, torch.tensor([label]), tau)
        assert float(loss) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("tau", GRADIENTS)
def test_worked_gradients(tau):
    h = torch.tensor(H, requires_grad=True)
    comp_sum_loss(h, torch.tensor([0]), tau).backward()
    torch.testing.assert_close(h.grad[0], torch.tensor(GRADIENTS[tau]), rtol=2e-6, atol=1e-9)
    assert abs(float(h.grad.sum())) < 1e-7


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0, 1.7, 2.0])
@pytest.mark.parametrize("map", ["softmax", "stablemax"])
def test_definition_in_probabilities(tau, map):
    draw = torch.Generator().manual_seed(1)
    h = torch.randn((20, 7), dtype=torch.float64, generator=draw, requires_grad=True)
    y = torch.randint(0, 7, (20,), generator=draw)
    s = torch.exp(h) if map == "softmax" else torch.where(h < 0, 1 / (1 - h.clamp(max=0)), 1 + h)
    p = (s / s.sum(1, keepdim=True)).gather(1, y[:, None])[:, 0]
    expected = -p.log() if tau == 1 else (p ** (tau - 1) - 1) / (1 - tau)
    loss = comp_sum_loss(h, y, tau, map=map, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    up = torch.rand(20, dtype=torch.float64, generator=draw)
    (ours,) = torch.autograd.grad(loss @ up, h)
    (theirs,) = torch.autograd.grad(expected @ up, h)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


def test_members():
    h = torch.randn((9, 5), generator=torch.Generator().manual_seed(2))
    y = torch.arange(9) % 5
    p = torch.softmax(h.double(), 1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(mae_loss(h, y).double(), (1 - p).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        generalized_cross_entropy(h, y, 0.7).double(), ((1 - p**0.7) / 0.7).mean(), rtol=1e-6,
        atol=0,
    )  # fmt: skip
    torch.testing.assert_close(
        sum_exponential_loss(h, y).double(), (1 / p - 1).mean(), rtol=1e-6, atol=0
    )
    assert comp_sum_loss(h, y, 1.0) == cross_entropy(h, y)
    assert comp_sum_loss(h, y, 1.0, map="stablemax") == stablemax_cross_entropy(h, y)
    assert float(mae_loss(1e4 * h, y)) <= 1


@pytest.mark.parametrize("near", [1 - 1e-6, 1 + 1e-6])
def test_continuous_at_cross_entropy(near):
    h = torch.randn((50, 6), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.arange(50) % 6
    assert float(comp_sum_loss(h, y, near)) == pytest.approx(float(cross_entropy(h, y)), rel=1e-5)


def test_saturated_rows_keep_their_digits():
    h = torch.tensor([[40.0, 0.0, 0.0]])
    for tau in (0.0, 0.5, 1.5, 2.0):
        loss = float(comp_sum_loss(h, torch.tensor([0]), tau))
        assert loss == pytest.approx(2 * math.exp(-40), rel=1e-6)


def test_robust_to_label_noise():
    """Four labels of ten wrong: the bounded members end above cross-entropy on clean test data."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn((10, 20), generator=draw)
    y = torch.randint(0, 10, (600,), generator=draw)
    x = centres[y] + 0.8 * torch.randn((600, 20), generator=draw)
    noisy = torch.where(
        torch.rand(600, generator=draw) < 0.4, torch.randint(0, 10, (600,), generator=draw), y
    )
    y_test = torch.randint(0, 10, (2000,), generator=draw)
    x_test = centres[y_test] + 0.8 * torch.randn((2000, 20), generator=draw)

    def accuracy(tau):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(20, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
        )
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(400):
            optimizer.zero_grad()
            comp_sum_loss(net(x), noisy, tau).backward()
            optimizer.step()
        return float((net(x_test).argmax(1) == y_test).double().mean())

    assert accuracy(1.7) > accuracy(1.0) + 0.03


def test_smooth_adversarial():
    h = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    moved = torch.tensor([[0.5, 0.5, -1.0]])
    y = torch.tensor([0])
    # margins (0, 1, 2) become (0, 0, 1.5)
    expected = comp_sum_loss(h, y, 1.5, logit_scale=2.0).item() + 0.3 * math.hypot(1.0, 0.5)
    loss = smooth_adversarial_comp_sum_loss(h, moved, y, 1.5, rho=0.5, nu=0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert torch.isfinite(h.grad).all()


def test_ascent_stays_in_the_ball_and_moves_the_margins():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    x, y = torch.randn(30, 6), torch.arange(30) % 4
    moved = adversarial_inputs(net, x, y, radius=0.1)
    assert float((moved - x).abs().max()) <= 0.1 + 1e-6
    random = x + 0.1 * (2 * torch.rand_like(x) - 1)

    def distance(points):
        a, b = net(points), net(x)
        d = (a.gather(1, y[:, None]) - a) - (b.gather(1, y[:, None]) - b)
        return float(torch.linalg.vector_norm(d, dim=1).mean())

    assert distance(moved) > 1.5 * distance(random)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    "call",
    [
        lambda h, y: comp_sum_loss(h, y, -0.1),
        lambda h, y: comp_sum_loss(h, y, 2.1),
        lambda h, y: comp_sum_loss(h, y, map="taylor"),
        lambda h, y: generalized_cross_entropy(h, y, 0.0),
        lambda h, y: smooth_adversarial_comp_sum_loss(h, h[:, :2], y),
        lambda h, y: smooth_adversarial_comp_sum_loss(h, h, y, rho=0.0),
        lambda h, y: smooth_adversarial_comp_sum_loss(h, h, y, reduction="all"),
        lambda h, y: adversarial_inputs(lambda x: x, h, y, radius=-1.0),
        lambda h, y: adversarial_inputs(lambda x: x, h, y, radius=1.0, steps=0),
    ],
)
def test_errors(call):
    with pytest.raises(InvalidInputError):
        call(torch.tensor(H), torch.tensor([0]))
