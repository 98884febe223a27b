"""LDR-KL and ALDR-KL: worked numbers, limits, the state of the temperatures."""

import math

import pytest

torch = pytest.importorskip("torch")

from flcore.errors import DTypeError, InvalidInputError
from flcore.losses import ALDRLoss, ldr_loss

F = torch.tensor([[1.0, 0.0, -1.0]])
Y = torch.tensor([0])


def plain(f, y, **options):
    return ldr_loss(f, y, normalize="none", **options)


def test_worked_numbers():
    assert float(plain(F, Y, margin=0.0)) == pytest.approx(-0.691006324223729, rel=1e-6)
    f = F.clone().requires_grad_()
    loss = plain(f, Y, margin=0.1)
    assert float(loss) == pytest.approx(-0.656404998632157, rel=1e-6)
    loss.backward()
    expected = torch.tensor([-0.3573835863, 0.2612683366, 0.0961152497])
    torch.testing.assert_close(f.grad[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("temperature", "value", "rel"), [(1e-3, -0.0010986, 1e-4), (1e3, -0.933032, 1e-3)]
)
def test_limits(temperature, value, rel):
    loss = plain(F.double(), Y, temperature=temperature, margin=0.1)
    assert float(loss) == pytest.approx(value, rel=rel)


@pytest.mark.parametrize("normalize", ["none", "softplus", "l1"])
def test_definition(normalize):
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn((8, 5), dtype=torch.float64, generator=draw, requires_grad=True)
    y = torch.arange(8) % 5
    f = scores
    if normalize == "softplus":
        f = torch.nn.functional.softplus(scores)
        f = f / f.mean(1, keepdim=True)
    elif normalize == "l1":
        f = scores / scores.abs().mean(1, keepdim=True)
    own = f.gather(1, y[:, None])
    z = f - own + 0.3 * (torch.arange(5) != y[:, None]).double()
    expected = 2.5 * (torch.logsumexp(z / 2.5, 1) - math.log(5))
    options = {"temperature": 2.5, "margin": 0.3, "normalize": normalize}
    ours = ldr_loss(scores, y, reduction="none", **options)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    (a,) = torch.autograd.grad(ours.sum(), scores, retain_graph=True)
    (b,) = torch.autograd.grad(expected.sum(), scores)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert torch.autograd.gradcheck(lambda s: ldr_loss(s, y, **options), scores)
    y[3] = -100
    kept = torch.arange(8) != 3
    torch.testing.assert_close(ldr_loss(scores, y, **options), ours[kept].mean())
    assert float(ldr_loss(scores, y, reduction="none", **options)[3].detach()) == 0.0


def test_alternation():
    """Four visits of one example; the loss of each uses the temperature it has just found."""
    loss = ALDRLoss(3, alpha=2.0, margin=0.1)
    expected = [
        (0.782911, -0.774463),
        (0.713185, -0.769531),
        (0.686294, -0.769368),
        (0.675375, -0.769570),
    ]
    for temperature, value in expected:
        assert float(loss(F, Y, torch.tensor([1]))) == pytest.approx(value, abs=2e-6)
        assert float(loss.temperatures[1]) == pytest.approx(temperature, abs=2e-6)
    assert loss.temperatures[[0, 2]].tolist() == [1.0, 1.0]


def test_uniform_scores_keep_the_temperature():
    loss = ALDRLoss(1, temperature=3.0, normalize="none")
    loss(torch.full((1, 4), 2.0), Y, torch.tensor([0]))
    assert float(loss.temperatures[0]) == pytest.approx(3.0, rel=1e-6)


def test_temperatures_stay_in_range():
    draw = torch.Generator().manual_seed(1)
    loss = ALDRLoss(50, temperature=1.5, alpha=2.0)
    for _ in range(20):
        index = torch.randperm(50, generator=draw)[:16]
        scores = 10 * torch.randn((16, 7), generator=draw)
        loss(scores, torch.arange(16) % 7, index)
    assert float(loss.temperatures.min()) >= 0.75 and float(loss.temperatures.max()) <= 1.5
    assert float(loss.temperatures.min()) < 1.4


def test_gradient_is_that_of_the_new_temperature():
    scores = torch.tensor([[0.3, 1.2, -0.4]], dtype=torch.float64, requires_grad=True)
    loss = ALDRLoss(1, normalize="none", margin=0.2)
    loss(scores, torch.tensor([1]), torch.tensor([0])).backward()
    t = float(loss.temperatures[0])
    p = torch.softmax((scores.detach() + torch.tensor([[0.2, 0.0, 0.2]])) / t, 1)
    torch.testing.assert_close(
        scores.grad, p - torch.tensor([[0.0, 1, 0]], dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_state():
    loss = ALDRLoss(4)
    loss(F, Y, torch.tensor([2]))
    again = ALDRLoss(4)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.temperatures, loss.temperatures)
    loss.eval()
    before = loss.temperatures.clone()
    loss(F, Y, torch.tensor([0]))
    assert torch.equal(loss.temperatures, before)


def test_the_last_row_of_an_example_decides():
    twice = torch.tensor([[1.0, 0.0, -1.0], [5.0, 0.0, -1.0]])
    loss, last = ALDRLoss(2, normalize="none"), ALDRLoss(2, normalize="none")
    loss(twice, torch.tensor([0, 0]), torch.tensor([1, 1]))
    last(twice[1:], Y, torch.tensor([1]))
    assert torch.equal(loss.temperatures, last.temperatures)


def test_all_zero_scores():
    scores = torch.zeros((2, 3), requires_grad=True)
    ldr_loss(scores, torch.tensor([0, 1]), normalize="l1").backward()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ldr_loss(F, Y, temperature=0.0),
        lambda: ldr_loss(F, Y, normalize="l2"),
        lambda: ldr_loss(F, Y, reduction="all"),
        lambda: ldr_loss(F[0], Y),
        lambda: ALDRLoss(0),
        lambda: ALDRLoss(3, alpha=1.0),
        lambda: ALDRLoss(3, temperature=-1.0),
        lambda: ALDRLoss(3, normalize="l2"),
        lambda: ALDRLoss(3, reduction="all"),
        lambda: ALDRLoss(3)(F, Y, torch.tensor([3])),
        lambda: ALDRLoss(3)(F, Y, torch.tensor([-1])),
        lambda: ALDRLoss(3)(F, Y, torch.tensor([0, 1])),
    ],
)
def test_errors(make):
    with pytest.raises(InvalidInputError):
        make()


def test_wrong_types():
    with pytest.raises(DTypeError):
        ldr_loss(F.long(), Y)
    with pytest.raises(DTypeError):
        ALDRLoss(3)(F, Y, torch.tensor([0.0]))
