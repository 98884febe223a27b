"""FedLD: the margin-control loss by hand, principal directions tensor by tensor."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.algorithms import Arrival, Arrivals, FedAvg, FedLD, Layout, Server, create
from flcore.algorithms.fedld import margin_loss
from flcore.errors import InvalidInputError
from toy_problem import PLAIN, Toy

torch = pytest.importorskip("torch")

Z = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
Y = torch.tensor([0, 1])
HALF = torch.full((2,), 0.5, dtype=torch.float64)
ROWS = np.array([[1, 0, 0.5], [0.2, 1, 0], [1, 0.8, 1]])


def step(algorithm, updates, layout, round=1):
    server = Server(np.zeros(layout.numel), layout, len(updates), len(updates), round=round)
    arrivals = Arrivals([Arrival(i, 1 + i, {"update": u}) for i, u in enumerate(updates)])
    algorithm.server_step(server, arrivals.mean(algorithm.weights(arrivals)), arrivals)
    return server.model


@pytest.mark.parametrize(
    ("reduction", "value"), [("batch", 0.3075078402), ("sample", 0.2729174771)]
)
def test_loss_by_hand(reduction, value):
    loss = margin_loss(lambda x: x, Z, Y, HALF, {}, margin=0.1, reduction=reduction)
    assert loss.item() == pytest.approx(value, abs=1e-9)


def test_gradient_of_the_batch_term_flows_through_the_probabilities():
    z = Z.clone().requires_grad_()
    margin_loss(lambda x: x, z, Y, HALF * 0, {}, margin=0.1).backward()
    assert torch.equal(z.grad, torch.zeros_like(z))  # all padding
    (both,) = torch.autograd.grad(margin_loss(lambda x: x, z, Y, HALF, {}, margin=0.1), z)
    (plain,) = torch.autograd.grad(margin_loss(lambda x: x, z, Y, HALF, {}, margin=0.0), z)
    p = Z.softmax(1)
    norm = 1.3967889627
    expected = 0.1 * 2 / (1 + norm) * p * (p - (p * p).sum(1, keepdim=True))
    assert torch.allclose(both - plain, expected, atol=1e-10)


@pytest.mark.parametrize("reduction", ["batch", "sample"])
def test_padding_does_not_count(reduction):
    padded = torch.cat([Z, torch.tensor([[7.0, -7.0]], dtype=torch.float64)])
    y, weight = torch.tensor([0, 1, 0]), torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    options = {"margin": 0.1, "reduction": reduction}
    a = margin_loss(lambda x: x, Z, Y, HALF, {}, **options)
    b = margin_loss(lambda x: x, padded, y, weight, {}, **options)
    assert torch.equal(a, b)


def test_without_a_margin_the_loss_is_the_cross_entropy():
    assert FedLD(margin=0).batch_loss() is None
    loss = margin_loss(lambda x: x, Z, Y, HALF, {}, margin=0.0)
    assert loss.item() == pytest.approx(0.2200948493, abs=1e-9)


def test_server_step_by_hand():
    moved = step(FedLD(), list(ROWS), Layout({"w": (3,)}))
    assert moved == pytest.approx([0.64769196, 0.57123696, 0.50587890], abs=1e-7)


def test_each_tensor_has_directions_of_its_own():
    layout = Layout({"a": (3,), "b": (1, 3), "c": (1,)})
    updates = [np.concatenate([row, 2 * row, row[:1]]) for row in ROWS]
    moved = step(FedLD(server_lr=0.5), updates, layout)
    one = step(FedLD(), list(ROWS), Layout({"w": (3,)}))
    assert moved[:3] == pytest.approx(one / 2, abs=1e-7)
    assert moved[3:6] == pytest.approx(one, abs=1e-7)
    assert moved[6] == pytest.approx(ROWS[:, 0].mean() / 2)  # one element: the mean


def test_the_first_round_and_no_directions_take_the_mean():
    mean = ROWS.mean(0)
    layout = Layout({"w": (3,)})
    assert step(FedLD(), list(ROWS), layout, round=0) == pytest.approx(mean)
    assert step(FedLD(keep=None), list(ROWS), layout) == pytest.approx(mean)
    assert step(FedLD(keep=0.3), list(ROWS), layout) == pytest.approx(mean)  # int(0.9) directions


def test_statistics_and_excluded_tensors_take_the_mean():
    layout = Layout({"a": (3,), "b": (3,), "s": (3,)}, trained=6)
    updates = [np.tile(row, 3) for row in ROWS]
    projected = step(FedLD(), list(ROWS), Layout({"w": (3,)}))
    mean = ROWS.mean(0)
    default = step(FedLD(), updates, layout).reshape(3, 3)
    assert default == pytest.approx(np.stack([projected, projected, mean]))
    chosen = step(FedLD(exclude=("b",)), updates, layout).reshape(3, 3)
    assert chosen == pytest.approx(np.stack([projected, mean, projected]))
    with pytest.raises(InvalidInputError, match=r"exclude: the model has no tensors \['x'\]"):
        step(FedLD(exclude=("x",)), updates, layout)


def test_only_shared_tensors_are_moved():
    layout = Layout({"own": (2,), "w": (3,)}, groups={"own": "personal"})
    moved = step(FedLD(), list(ROWS), layout)
    assert moved[:2].tolist() == [0, 0]
    assert moved[2:] == pytest.approx([0.64769196, 0.57123696, 0.50587890], abs=1e-7)


def test_equal_updates_come_out_as_they_are_and_scale_passes_through():
    layout = Layout({"w": (2,)})
    assert step(FedLD(), [np.array([3.0, 4.0])] * 2, layout) == pytest.approx([3, 4])
    layout = Layout({"w": (3,)})
    once, thrice = step(FedLD(), list(ROWS), layout), step(FedLD(), list(3 * ROWS), layout)
    assert thrice == pytest.approx(3 * once)
    assert step(FedLD(), list(ROWS[::-1]), layout) == pytest.approx(once)


def test_rotating_the_updates_rotates_the_step():
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    layout = Layout({"w": (3,)})
    turned = step(FedLD(), list(ROWS @ rotation.T), layout)
    assert turned == pytest.approx(rotation @ step(FedLD(), list(ROWS), layout), abs=1e-6)


def test_the_step_is_no_longer_than_its_directions_allow():
    layout = Layout({"w": (6,)})
    for seed in range(20):
        rows = np.random.default_rng(seed).normal(size=(5, 6))
        shares = np.sort(np.linalg.eigvalsh(rows @ rows.T))[::-1]
        bound = np.sqrt(((shares / shares.sum())[:4] ** 2).sum())
        longest = bound * np.linalg.norm(rows, axis=1).mean()
        assert np.linalg.norm(step(FedLD(), list(rows), layout)) <= longest * (1 + 1e-6)


def test_duplicate_directions_stay_finite():
    rows = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [2, 0, 1], [0, 1, 1]], float)
    assert np.isfinite(step(FedLD(), list(rows), Layout({"w": (3,)}))).all()


def test_without_both_parts_it_is_fedavg_with_uniform_weights_bit_for_bit():
    ours = Toy(FedLD(margin=0, keep=None, **PLAIN))
    plain = Toy(FedAvg(weighting="uniform", **PLAIN))
    for _ in range(10):
        assert np.array_equal(ours.play(), plain.play())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -1}, "margin: expected a number from 0"),
        ({"reduction": "mean"}, 'reduction: expected "batch" or "sample"'),
        ({"keep": 0}, "keep: expected a number above 0 up to 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        create("fedld", **options)
