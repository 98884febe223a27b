"""Global contrastive losses: gradients against the decoupled form, temperatures, state."""

import math

import pytest

torch = pytest.importorskip("torch")

from flcore.errors import DTypeError, InvalidInputError
from flcore.losses import GlobalContrastiveLoss, TwoModalityContrastiveLoss


def views(n=6, d=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn((n, d), generator=draw, requires_grad=True) for _ in range(2))


def normalized(z):
    return torch.nn.functional.normalize(z, dim=1)


def test_gradient_is_the_decoupled_form():
    """gamma = 1 and a fixed temperature: tau log mean exp(h / tau), positives left out."""
    a, b = views()
    loss = GlobalContrastiveLoss(10, individual=False, temperature=0.2, gamma=1.0)
    loss(a, b, torch.arange(6)).backward()
    ours = a.grad.clone(), b.grad.clone()
    a.grad = b.grad = None
    za, zb = normalized(a), normalized(b)
    total = 0.0
    for i in range(6):
        for x, y in ((za, zb), (zb, za)):
            others = [j for j in range(6) if j != i]
            s = torch.cat([x[i] @ x[others].T, x[i] @ y[others].T]) - x[i] @ y[i]
            total = total + 0.2 * (torch.logsumexp(s / 0.2, 0) - math.log(10)) / 6
    total.backward()
    torch.testing.assert_close(ours[0], a.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[1], b.grad, rtol=1e-4, atol=1e-6)


def test_two_modalities_gradient():
    a, b = views(seed=1)
    loss = TwoModalityContrastiveLoss(6, individual=False, temperature=0.05, gamma=1.0)
    loss(a, b, torch.arange(6)).backward()
    ours = a.grad.clone()
    a.grad = b.grad = None
    s = normalized(a) @ normalized(b).T
    h = s - s.diagonal()[:, None], s.T - s.diagonal()[:, None]
    off = torch.full((6, 6), 0.0).fill_diagonal_(-torch.inf)
    sum(0.05 * torch.logsumexp(x / 0.05 + off, 1).mean() for x in h).backward()
    torch.testing.assert_close(ours, a.grad, rtol=1e-4, atol=1e-6)


def test_equal_similarities():
    """All views alike: p = 1, G = rho, so the first step is eta beta rho."""
    z = torch.ones(4, 3)
    loss = GlobalContrastiveLoss(4)
    assert float(loss(z, z, torch.arange(4))) == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(loss.state.tau, torch.full((4,), 0.1 - 0.01 * 0.9 * 0.3))
    torch.testing.assert_close(loss.state.u * loss.state.b.exp(), torch.ones(4))


def test_slope_is_the_divergence():
    """G = rho - KL(weights || uniform) once u is the mean of the batch."""
    a, b = (z.detach() for z in views(seed=2))
    loss = GlobalContrastiveLoss(6, temperature=0.3, gamma=1.0, beta=1.0, eta=0.0)
    loss(a, b, torch.arange(6))
    za, zb = normalized(a), normalized(b)
    divergences = []
    for x, y in ((za, zb), (zb, za)):
        s = torch.cat([x @ x.T, x @ y.T], 1)
        s = s.masked_fill(torch.eye(6, dtype=torch.bool).repeat(1, 2), -torch.inf)
        p = torch.softmax(s / 0.3, 1)
        divergences.append(torch.xlogy(p, 10 * p).sum(1))
    expected = 0.3 - sum(divergences) / 2
    torch.testing.assert_close(loss.state.v, expected, rtol=1e-4, atol=1e-5)


def test_moving_denominator():
    a, b = (z.detach() for z in views(seed=3))
    loss = GlobalContrastiveLoss(6, individual=False, temperature=0.5, gamma=0.25)
    denominators = []
    for first, second in ((a, b), (b * 2 + a, a)):
        fresh = GlobalContrastiveLoss(6, individual=False, temperature=0.5)
        fresh(first, second, torch.arange(6))
        denominators.append(fresh.state.u * fresh.state.b.exp())
        loss(first, second, torch.arange(6))
    # relative to the positives, which move as well: compare in the same units
    expected = 0.75 * denominators[0] + 0.25 * denominators[1]
    torch.testing.assert_close(loss.state.u * loss.state.b.exp(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [GlobalContrastiveLoss, TwoModalityContrastiveLoss])
def test_others_stay_bit_for_bit(make):
    loss = make(20)
    a, b = (z.detach() for z in views(8, seed=4))
    loss(a, b, torch.arange(8))
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    loss(a + 1, b, torch.tensor([3, 4, 5, 12, 13, 14, 15, 16]))
    for name, value in loss.state_dict().items():
        assert torch.equal(value[[0, 1, 2, 6, 7, 8, 19]], before[name][[0, 1, 2, 6, 7, 8, 19]])
        if not name.endswith("b"):
            assert not torch.equal(value[[3, 12]], before[name][[3, 12]])


@pytest.mark.parametrize("make", [GlobalContrastiveLoss, TwoModalityContrastiveLoss])
def test_range_and_large_exponents(make):
    loss = make(8)
    for seed in range(40):
        a, b = (z.detach() for z in views(8, seed=seed))
        loss(100 * a, b, torch.arange(8))
    state = loss.state_dict()
    for name in state:
        assert torch.isfinite(state[name]).all()
        if name.endswith("tau"):
            low, high = (0.05, 0.7) if make is GlobalContrastiveLoss else (0.005, 0.05)
            assert low - 1e-7 <= float(state[name].min()) <= float(state[name].max()) <= high + 1e-7


def test_evaluation_and_twice_the_same_example():
    a, b = (z.detach() for z in views(4, seed=5))
    loss = GlobalContrastiveLoss(4)
    loss.eval()
    loss(a, b, torch.arange(4))
    assert not loss.state.u.any()
    loss.train()
    loss(a, b, torch.tensor([0, 1, 2, 2]))
    single = GlobalContrastiveLoss(4)
    single(a, b, torch.tensor([0, 1, 3, 2]))
    assert float(loss.state.u[2]) == float(single.state.u[2]) and float(loss.state.u[3]) == 0


def test_a_small_batch_learns():
    """Clustered data, batches of 16: a linear probe reads the clusters from the embedding."""
    torch.manual_seed(0)
    centres = torch.randn(5, 10)
    labels = torch.arange(300) % 5
    x = centres[labels] + 0.3 * torch.randn(300, 10)
    net = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    loss = GlobalContrastiveLoss(300)
    optimizer = torch.optim.Adam([*net.parameters()], 3e-3)
    for _ in range(300):
        index = torch.randperm(300)[:16]
        noise = 0.3 * torch.randn(2, 16, 10)
        value = loss(net(x[index] + noise[0]), net(x[index] + noise[1]), index)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    with torch.no_grad():
        z = normalized(net(x))
    means = torch.stack([z[labels == k].mean(0) for k in range(5)])
    assert float(((z @ normalized(means).T).argmax(1) == labels).double().mean()) > 0.95


@pytest.mark.parametrize(
    "make",
    [
        lambda: GlobalContrastiveLoss(0),
        lambda: GlobalContrastiveLoss(3, temperature=1.0),
        lambda: GlobalContrastiveLoss(3, gamma=0.0),
        lambda: GlobalContrastiveLoss(3, beta=1.5),
        lambda: GlobalContrastiveLoss(3, eta=-1.0),
        lambda: GlobalContrastiveLoss(3)(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0])),
        lambda: GlobalContrastiveLoss(3)(torch.ones(2, 2), torch.ones(2, 3), torch.tensor([0, 1])),
        lambda: GlobalContrastiveLoss(3)(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([0, 3])),
    ],
)
def test_errors(make):
    with pytest.raises(InvalidInputError):
        make()


def test_wrong_types():
    with pytest.raises(DTypeError):
        GlobalContrastiveLoss(3)(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([0.0, 1.0]))
