"""FedWon: standardised weights, models without normalisation, gradients clipped by unit."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from algorithm_problem import PLAIN, blobs, play, simulation
from flcore.algorithms import FedAvg, FedBN, FedWon, Layout, StepSpec, UnitClip, local_steps
from flcore.algorithms.fedwon import output_units
from flcore.errors import InvalidInputError
from flcore.nn import ScaledWSConv2d, normalizer_free, standardized_weight
from flcore.simulation import load_dataset

nn = torch.nn


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- standardised weights ------------------------------------------------------------------------


def test_two_rows_by_hand():
    w = torch.tensor([[1.0, 2, 3, 6], [0, 0, 0, 4]], dtype=torch.float64)
    out = standardized_weight(w, torch.ones(2, dtype=torch.float64))
    first = [-0.5345224838, -0.2672612419, 0.0, 0.8017837257]
    second = [-0.2886751346, -0.2886751346, -0.2886751346, 0.8660254038]
    np.testing.assert_allclose(out, [first, second], rtol=0, atol=1e-10)


def test_rows_sum_to_0_and_are_as_long_as_their_gain():
    gain = torch.tensor([1.0, -0.5, 3.0], dtype=torch.float64)
    out = standardized_weight(drawn(3, 2, 3, 3), gain).flatten(1)
    assert out.sum(1).abs().max() < 1e-14
    torch.testing.assert_close(out.norm(dim=1), gain.abs())


def test_row_that_hardly_varies_is_divided_by_the_root_of_eps():
    """Deviations of 1e-3 twice: 2e-6 is below eps = 1e-4."""
    out = standardized_weight(torch.tensor([[1.0, 1.002]], dtype=torch.float64), torch.ones(1))
    np.testing.assert_allclose(out, [[-0.1, 0.1]], rtol=1e-9)


def test_scale_and_offset_of_a_row_change_nothing_and_so_its_gradient_is_orthogonal():
    w, gain = drawn(4, 6).requires_grad_(), drawn(4, seed=1)
    out = standardized_weight(w, gain)
    torch.testing.assert_close(standardized_weight(2.5 * w + 7, gain), out)
    (slope,) = torch.autograd.grad((out * drawn(4, 6, seed=2)).sum(), w)
    assert (slope * w).sum(1).abs().max() < 1e-13
    assert slope.sum(1).abs().max() < 1e-13


def test_gradient_is_the_closed_form():
    """dW = (gain / s) (dV - mean dV - z mean(dV z)), z = (W - mean) / sigma, s = sigma sqrt(N)."""
    w, gain, up = drawn(3, 5).requires_grad_(), drawn(3, seed=1), drawn(3, 5, seed=2)
    (slope,) = torch.autograd.grad((standardized_weight(w, gain) * up).sum(), w)
    with torch.no_grad():
        sigma = w.std(1, correction=0, keepdim=True)
        z = (w - w.mean(1, keepdim=True)) / sigma
        rest = up - up.mean(1, keepdim=True) - z * (up * z).mean(1, keepdim=True)
        by_hand = gain[:, None] / (sigma * 5**0.5) * rest
    torch.testing.assert_close(slope, by_hand)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_is_that_of_the_standardised_weight(groups):
    conv = ScaledWSConv2d(4, 6, 3, stride=2, padding=1, groups=groups)
    with torch.no_grad():
        conv.gain.copy_(drawn(6, dtype=torch.float32))
    x = drawn(2, 4, 7, 7, dtype=torch.float32)
    weight = standardized_weight(conv.weight, conv.gain)
    expected = nn.functional.conv2d(x, weight, conv.bias, 2, 1, groups=groups)
    torch.testing.assert_close(conv(x), expected)


def test_one_gain_a_row():
    with pytest.raises(InvalidInputError, match=r"gain \(O,\), got \(3, 4\) and \(4,\)"):
        standardized_weight(torch.ones(3, 4), torch.ones(4))


# ---- models --------------------------------------------------------------------------------------


def test_surgery_keeps_weights_and_takes_normalisation_out_at_any_depth():
    inner = nn.Sequential(nn.Conv2d(2, 4, 3, padding="same", bias=False), nn.BatchNorm2d(4))
    model = nn.Sequential(
        inner, nn.Conv2d(4, 3, 3, stride=2), nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5)
    )
    x = drawn(2, 2, 6, 6, dtype=torch.float32)
    before = model(x)
    made = normalizer_free(model)
    assert not [m for m in made.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    convs = [m for m in made.modules() if isinstance(m, nn.Conv2d)]
    assert [type(m) for m in convs] == [ScaledWSConv2d] * 2
    assert torch.equal(convs[0].weight, inner[0].weight) and not convs[0].bias.any()
    assert torch.equal(convs[1].bias, model[1].bias) and convs[1].stride == (2, 2)
    assert torch.equal(made[3].weight, model[3].weight)  # linear layers are not standardised
    assert made(x).shape == before.shape
    assert isinstance(model[0][1], nn.BatchNorm2d)  # the model itself is as it was


def test_surgery_twice_is_surgery_once():
    once = normalizer_free(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    x = drawn(1, 1, 4, 4, dtype=torch.float32)
    assert torch.equal(normalizer_free(once)(x), once(x))


# ---- clipping by unit ----------------------------------------------------------------------------


def clipped(w, g, units, threshold, x_type):
    """Gradient that one step of size 1 takes, from weights w."""
    x = x_type(np.array([w], np.float64))
    spec = StepSpec(lr=1.0, unit_clip=UnitClip(threshold, np.array(units)))
    local_steps(x, lambda rows, k: x_type(np.array([g], np.float64)), [spec], [1])
    return np.array(w) - np.asarray(x)[0]


@pytest.mark.parametrize("x_type", [np.array, torch.tensor])
def test_clipping_by_hand(x_type):
    """Row of weights of norm sqrt(50), gradient of norm 5, c = 0.1: scaled by 0.14142."""
    g = clipped([5.0, 5, 0, 0], [3.0, 4, 0, 0], [0, 0, 0, 0], 0.1, x_type)
    np.testing.assert_allclose(g, [0.4242640687, 0.5656854249, 0, 0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("x_type", [np.array, torch.tensor])
def test_unit_below_the_threshold_and_the_last_layer_are_untouched_bitwise(x_type):
    w, g = [0.0, 0, 0, 0, 0, 0], [0.1, 0.7, 1e-5, 2e-5, 30.0, 40.0]
    out = clipped(w, g, [0, 0, 1, 1, -1, -1], 1.0, x_type)
    assert out[2:].tolist() == g[2:]  # 2.2e-5 is below the floor of 1e-3; -1 is never clipped
    np.testing.assert_allclose(np.linalg.norm(out[:2]), 1e-3, rtol=1e-12)


def test_units_are_rows_whole_vectors_and_not_the_last_layer():
    shapes = {"conv": (2, 1, 2), "gain": (2,), "bias": (3,), "head": (2, 2), "mean": (2,)}
    layout = Layout(shapes, trained=13, kinds={"head": "classifier"})
    expected = [0, 0, 1, 1, 2, 2, 3, 3, 3, -1, -1, -1, -1]
    assert output_units(layout).tolist() == expected


def test_one_round_by_hand():
    """One client, one full batch: w - lr * (gradient clipped row by row), last layer not."""
    data = blobs(clients=1, each=9, shape=(1, 4, 4))
    options = PLAIN | {"local_epochs": 1, "batch_size": 9}
    run = simulation(FedWon(threshold=0.02, **options), "cnn-bn", data)
    w = run.server.model.copy()
    g = run.server.tools.gradient(w, *(torch.from_numpy(a) for a in (data.x_train, data.y_train)))
    units, expected = output_units(run.layout), w - 0.1 * g
    hit = 0
    for unit in range(units.max() + 1):
        here = units == unit
        limit = 0.02 * max(np.linalg.norm(w[here]), 1e-3)
        if np.linalg.norm(g[here]) > limit:
            expected[here] = w[here] - 0.1 * g[here] * limit / np.linalg.norm(g[here])
            hit += 1
    assert 0 < hit and (units < 0).sum() == 3 * 64 + 3
    run.step()
    np.testing.assert_allclose(run.server.model, expected, rtol=0, atol=1e-6)


# ---- the method ----------------------------------------------------------------------------------


def test_without_convolutions_and_without_a_threshold_it_is_fedavg():
    ours = play(simulation(FedWon(threshold=None, **PLAIN), "mlp"), 3)
    theirs = play(simulation(FedAvg(**PLAIN), "mlp"), 3)
    np.testing.assert_array_equal(ours, theirs)


def test_clients_keep_nothing_so_that_two_may_swap_identities():
    """Client 0 and 1 change places after a round, and places in time: the sums are the same."""
    options = PLAIN | {"local_lr": 0.05, "local_epochs": 1, "batch_size": 100}
    data = blobs(shape=(1, 4, 4))
    ends = []
    for swap in (False, True):
        run = simulation(FedWon(**options), "cnn", data)
        run.step()
        if swap:
            states, parts = run.clients.states, run.clients.partition
            states[0], states[1] = states[1], states[0]
            parts[0], parts[1] = parts[1], parts[0]
        assert not any(run.clients.states.values())
        run.step()
        ends.append(run.server.model)
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-6)


def test_batches_of_one_will_do():
    options = PLAIN | {"local_lr": 0.02, "batch_size": 1}
    run = simulation(FedWon(**options), "cnn-bn", blobs(shape=(1, 4, 4)), rounds=5)
    records = [run.step() for _ in range(5)]
    assert records[-1].train_loss < 0.7 * records[0].train_loss


def test_options_are_checked():
    for option in ("threshold", "floor", "epsilon"):
        with pytest.raises(InvalidInputError, match=option):
            FedWon(**{option: 0})


def small_cnn(seed):
    torch.manual_seed(seed)
    blocks = [
        (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
        for a, b in ((1, 8), (8, 16))
    ]
    return nn.Sequential(*blocks[0], *blocks[1], nn.Flatten(), nn.Linear(64, 10))


def domains(algorithm, seed, rounds=15):
    """Mean accuracy of the last three rounds; all domains have the same test examples."""
    data = load_dataset("digits-domains")
    run = simulation(algorithm, small_cnn(seed), data, rounds=rounds, seed=seed)
    return np.mean([run.step().accuracy for _ in range(rounds)][-3:])


@pytest.mark.slow
def test_better_than_averaged_batch_normalisation_on_four_domains():
    won = domains(FedWon(local_lr=0.3), 0)
    common = domains(FedBN(keep="nothing", local_lr=0.3), 0)
    assert won > common + 0.1
