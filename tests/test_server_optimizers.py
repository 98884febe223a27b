"""FedAvgM, FedAdagrad, FedAdam, FedYogi: worked numbers, inputs, state, policies, errors."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from flcore import _variants
from flcore.aggregation import FedAdagrad, FedAdam, FedAvgM, FedYogi, Mean, Median
from flcore.errors import NonFiniteError
from flcore.ops import random_normal
from flcore.ops._step import SERVER_STREAM
from support import HAS_TORCH

ROUNDS = (np.float32([0.1, -0.2]), np.float32([0.3, 0.1]))
VARIANTS = [v for v, why in _variants.available("combine_step", "cpu").items() if not why]

WORKED = {
    "FedAvgM": (lambda: FedAvgM(lr=1.0, momentum=0.9), ([0.1, -0.2], [0.49, -0.28])),
    "FedAdagrad": (
        lambda: FedAdagrad(lr=0.1, beta1=0.0, tau=1e-3, v0=0.0),
        ([0.0990099, -0.0995025], [0.1935792, -0.0549802]),
    ),
    "FedAdam": (
        lambda: FedAdam(lr=0.1, tau=1e-3, v0=0.0),
        ([0.0909091, -0.0952381], [0.2105155, -0.1296156]),
    ),
    "FedAdam of Flower": (
        lambda: FedAdam(lr=0.1, convention="flower"),
        ([0.0742460, -0.0742460], [0.1527150, -0.0970896]),
    ),
    "FedYogi": (
        lambda: FedYogi(lr=0.01, tau=1e-3, v0=0.0),
        ([0.0090909, -0.0095238], [0.0210458, -0.0129484]),
    ),
}
MAKERS = {name: make for name, (make, _) in WORKED.items()}


def clients(rng: np.random.Generator, n: int = 5, size: int = 300) -> list[np.ndarray]:
    return [rng.standard_normal(size).astype(np.float32) for _ in range(n)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", WORKED)
def test_two_rounds_by_hand(name, dtype):
    make, want = WORKED[name]
    server, w = make(), np.zeros(2, dtype)
    for d, right in zip(ROUNDS, want, strict=True):
        w = server.step(w, [d.astype(dtype)])
        assert w.dtype == dtype
        np.testing.assert_allclose(w, right, atol=6e-8)
    assert server.round == 2


def test_kingma_correction_by_hand():
    """Round 1: m = 0.1 D, v = 0.01 D^2, lr_1 = 0.1 sqrt(0.01) / 0.1: a step of lr sign(D)."""
    server = FedAdam(lr=0.1, tau=1e-12, v0=0.0, bias_correction="adam")
    w = server.step(np.zeros(2), [ROUNDS[0].astype(np.float64)])
    np.testing.assert_allclose(w, [0.1, -0.1], rtol=1e-9)
    w = server.step(w, [ROUNDS[1].astype(np.float64)])
    d = np.array(ROUNDS, dtype=np.float64)
    m, v = (0.09 * d[0] + 0.1 * d[1]) / 0.19, (0.0099 * d[0] ** 2 + 0.01 * d[1] ** 2) / 0.0199
    np.testing.assert_allclose(w, [0.1, -0.1] + 0.1 * m / np.sqrt(v), rtol=1e-7)


def test_defaults_follow_the_convention():
    paper, flower = FedAdam(), FedAdam(convention="flower")
    assert (paper.tau, paper.v0, paper.bias_correction) == (1e-3, 1e-6, False)
    assert (flower.tau, flower.v0, flower.bias_correction) == (1e-9, 0.0, "flower")
    assert FedYogi(convention="flower").tau == 1e-3 and FedAdagrad(convention="flower").tau == 1e-9
    assert (FedAvgM().lr, FedAvgM().momentum) == (1.0, 0.9)
    assert (FedYogi(tau=0.1).v0, FedAdagrad(v0=0.5).v0) == (0.1**2, 0.5)
    assert "lr=0.1, betas=(0.9, 0.99)" in repr(paper)


def test_the_first_step_starts_from_v0():
    w = FedAdagrad(lr=1.0, tau=1e-3, v0=4.0).step(np.zeros(1), [np.float64([3.0])])
    np.testing.assert_allclose(w, 3.0 / (np.sqrt(13.0) + 1e-3), rtol=1e-12)


def test_without_momentum_it_is_fedavg(rng):
    updates, weights = clients(rng), rng.uniform(0, 9, 5)
    w = rng.standard_normal(300).astype(np.float32)
    server = FedAvgM(momentum=0.0)
    got = server.step(w, updates, weights)
    assert got.tobytes() == (w + Mean()(updates, weights)).tobytes()
    assert server.state_dict() == {"kind": "FedAvgM", "round": 1}


@pytest.mark.parametrize("accumulate", ["float32", "float64", "reproducible"])
def test_weights_and_accumulators_are_those_of_mean(accumulate, rng):
    updates, weights = clients(rng), [1, 0, 250, 30, 7]
    w = rng.standard_normal(300).astype(np.float32)
    mean = Mean(accumulate=accumulate)(updates, weights)
    got = FedAdam(accumulate=accumulate).step(w, updates, weights)
    assert got.tobytes() == FedAdam().step(w, [mean]).tobytes()


@pytest.mark.parametrize("name", MAKERS)
def test_models_and_updates_make_the_same_steps(name, rng):
    by_update, by_model = MAKERS[name](), MAKERS[name]()
    by_model.inputs = "models"
    w = start = rng.standard_normal(300)
    x = start
    for _ in range(3):
        updates = [rng.standard_normal(300) for _ in range(4)]
        x = by_model.step(x, [x + u for u in updates], [1, 2, 3, 4])
        w = by_update.step(w, updates, [1, 2, 3, 4])
    np.testing.assert_allclose(x, w, rtol=1e-9, atol=1e-9)


def test_half_precision_updates_step_a_float32_model(rng):
    updates = [u.astype(np.float16) for u in clients(rng)]
    w = rng.standard_normal(300).astype(np.float32)
    got, sent = FedAdam().step(w, updates, cast="float16")
    want = FedAdam().step(w, [u.astype(np.float32) for u in updates])
    assert got.tobytes() == want.tobytes() and got.dtype == np.float32
    assert sent.tobytes() == got.astype(np.float16).tobytes()
    buffer = np.empty(300, np.float16)
    assert FedAdam().step(w, updates, cast=buffer)[1] is buffer
    assert buffer.tobytes() == sent.tobytes()


def test_a_robust_rule_in_front(rng):
    updates = clients(rng)
    updates[1] *= 1e6
    w = rng.standard_normal(300).astype(np.float32)
    got = FedAdam().step(w, updates, rule=Median())
    assert got.tobytes() == FedAdam().step(w, [Median()(updates)]).tobytes()
    seen = []
    rule = lambda updates, weights: seen.append(weights) or Mean()(updates, weights)  # noqa: E731
    got = FedAdam(inputs="models").step(w, updates, [1, 2, 3, 4, 5], rule=rule)
    assert seen == [[1, 2, 3, 4, 5]]
    want = FedAdam().step(w, [Mean()(updates, [1, 2, 3, 4, 5]) - w])
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    with pytest.raises(NonFiniteError, match="rule: its aggregate"):
        FedAdam().step(w, updates, rule=lambda u, q: np.full(300, np.nan, np.float32))


# ---- state -------------------------------------------------------------------------------------


def rounds_of(server, w, rng, count: int, **options):
    for _ in range(count):
        w = server.step(w, clients(rng), rng.uniform(1, 5, 5), **options)
    return w


@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_run_has_the_same_bits(name):
    straight, first = MAKERS[name](), MAKERS[name]()
    straight.noise_std = first.noise_std = 0.1  # the noise depends on the round
    w = np.zeros(300, np.float32)
    want = rounds_of(straight, w, np.random.default_rng(0), 5)
    rng = np.random.default_rng(0)
    w = rounds_of(first, w, rng, 2)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    assert state["round"] == 2 and all(
        isinstance(x, str | int | np.ndarray) for x in state.values()
    )
    second = MAKERS[name]()
    second.noise_std = 0.1
    second.load_state_dict(state)
    rounds_of(first, w, np.random.default_rng(9), 3)  # must not reach into the saved state
    assert rounds_of(second, w, rng, 3).tobytes() == want.tobytes()
    second.load_state_dict(state)
    third = copy.deepcopy(second)
    assert (
        rounds_of(third, w, np.random.default_rng(5), 3).tobytes()
        == rounds_of(second, w, np.random.default_rng(5), 3).tobytes()
    )


@pytest.mark.parametrize("name", MAKERS)
def test_reset_starts_anew(name):
    server, w = MAKERS[name](), np.zeros(300, np.float32)
    want = rounds_of(server, w, np.random.default_rng(0), 2)
    server.reset()
    assert server.round == 0
    assert rounds_of(server, w, np.random.default_rng(0), 2).tobytes() == want.tobytes()


def test_state_buffers_are_exchanged_not_allocated(rng):
    server, w = FedAdam(), np.zeros(300, np.float32)
    addresses = []
    for _ in range(5):
        w = server.step(w, clients(rng))
        addresses.append((server._state["m"][0].ctypes.data, server._state["v"][0].ctypes.data))
    assert addresses[1] == addresses[3] and addresses[2] == addresses[4] != addresses[3]


def test_out_may_be_the_model(rng):
    w, updates = rng.standard_normal(300).astype(np.float32), clients(rng)
    want = FedAdam().step(w, updates)
    assert FedAdam().step(w, updates, out=w) is w and w.tobytes() == want.tobytes()


@pytest.mark.parametrize("policy", ["raise", "exclude", "propagate"])
@pytest.mark.parametrize("name", MAKERS)
def test_non_finite_updates(name, policy, rng):
    server, w = MAKERS[name](), np.zeros(300, np.float32)
    server.nonfinite = policy
    w = server.step(w, clients(rng))
    before, model = server.state_dict(), w.copy()
    good = clients(rng)
    bad = [*good[:2], np.full(300, np.nan, np.float32), *good[3:]]
    weights = [1, 2, 3, 4, 5]
    if policy == "raise":
        with pytest.raises(NonFiniteError, match=r"updates\[2\]"):
            server.step(w, bad, weights)
        after = server.state_dict()
        assert w.tobytes() == model.tobytes() and list(after) == list(before)
        assert all(np.array_equal(after[k], before[k]) for k in before)
        twin = MAKERS[name]()
        twin.load_state_dict(before)
        assert server.step(w, good).tobytes() == twin.step(w, good).tobytes()
    elif policy == "exclude":
        twin = MAKERS[name]()
        twin.load_state_dict(before)
        want = twin.step(w, good, [1, 2, 0, 4, 5])
        assert server.step(w, bad, weights).tobytes() == want.tobytes()
    else:
        assert np.isnan(server.step(w, bad, weights)).all()


def test_noise_is_named_by_seed_round_and_layer():
    server = FedAvgM(momentum=0.0, noise_std=0.5, seed=11)
    model = [np.zeros(900, np.float64), np.zeros(2, np.int64), np.zeros(100, np.float32)]
    update = [np.zeros(900, np.float64), np.ones(2, np.int64), np.zeros(100, np.float32)]
    for round in range(2):
        got = server.step(model, [update])
        for layer in (0, 2):  # the place in the update, integer layers counted
            z = random_normal(got[layer].size, 11, round=round, tensor=layer, client=SERVER_STREAM)
            np.testing.assert_array_equal(got[layer], z * got[layer].dtype.type(0.5))


# ---- integer layers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "want"), [("mean", [18, 3]), ("max", [20, 4]), ("sum", [30, 5]), ("first", [10, 1])]
)
def test_integer_layers_follow_a_policy(policy, want, rng):
    model = {"w": np.zeros(3, np.float32), "n": np.array([100, 200]), "on": np.array([True, False])}
    steps, on = ([10, 1], [20, 4]), ([True, True], [True, False])
    sent = [
        {"w": np.ones(3, np.float32), "n": np.array(n), "on": np.array(b)}
        for n, b in zip(steps, on, strict=True)
    ]
    got = FedAvgM(inputs="models", integers=policy).step(model, sent, [1, 3])
    assert got["n"].dtype == np.int64 and list(got["n"]) == want
    moved = FedAvgM(integers=policy).step(model, sent, [1, 3])
    assert list(moved["n"]) == [100 + want[0], 200 + want[1]]
    assert moved["on"].dtype == bool and moved["on"][0]
    out = {"w": np.empty(3, np.float32), "n": np.zeros(2, int), "on": np.zeros(2, bool)}
    assert FedAvgM(integers=policy).step(model, sent, [1, 3], out=out) is out
    assert list(out["n"]) == list(moved["n"])
    _, cast = FedAvgM(integers=policy).step(model, sent, [1, 3], cast="float16")
    assert cast["w"].dtype == np.float16 and list(cast["n"]) == list(moved["n"])


def test_excluded_clients_do_not_count_for_integer_layers():
    model = [np.zeros(3, np.float32), np.array([0])]
    sent = [[np.full(3, x, np.float32), np.array([n])] for x, n in ((1, 4), (np.nan, 90), (3, 8))]
    got = FedAvgM(nonfinite="exclude").step(model, sent)
    assert list(got[0]) == [2, 2, 2] and list(got[1]) == [6]


# ---- torch -------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
@pytest.mark.parametrize("name", MAKERS)
def test_torch_gives_the_bits_of_numpy(name, rng):
    import torch

    with_numpy, with_torch = MAKERS[name](), MAKERS[name]()
    w, x = np.zeros(300, np.float32), torch.zeros(300)
    for _ in range(3):
        updates = clients(rng)
        w = with_numpy.step(w, updates)
        x = with_torch.step(x, [torch.from_numpy(u) for u in updates])
    assert x.numpy().tobytes() == w.tobytes()
    resumed = MAKERS[name]()
    resumed.load_state_dict(with_torch.state_dict())
    updates = [torch.from_numpy(u) for u in clients(rng)]
    assert torch.equal(resumed.step(x, updates), with_torch.step(x, updates))


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_momentum_is_that_of_torch_sgd(rng):
    import torch

    parameter = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.3, momentum=0.8)
    server, w = FedAvgM(lr=0.3, momentum=0.8), np.zeros(50)
    for _ in range(4):
        d = rng.standard_normal(50)
        parameter.grad = torch.from_numpy(-d)
        optimizer.step()
        w = server.step(w, [d])
    np.testing.assert_allclose(w, parameter.detach().numpy(), rtol=1e-13)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_a_module_state_dict_takes_a_step():
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    model = {k: v.clone() for k, v in module.state_dict().items()}
    sent = [{k: v + 1 for k, v in model.items()} for _ in range(3)]
    new = FedAvgM(inputs="models").step(model, sent)
    module.load_state_dict(new)
    for key, x in new.items():
        torch.testing.assert_close(x, model[key] + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAKERS)
def test_gpu_gives_the_bits_of_the_cpu(name):
    import torch

    on_cpu, on_gpu = MAKERS[name](), MAKERS[name]()
    w, x = torch.zeros(10_001), torch.zeros(10_001, device="cuda")
    for _ in range(3):
        updates = [torch.randn(10_001) for _ in range(4)]
        w, x = on_cpu.step(w, updates), on_gpu.step(x, [u.cuda() for u in updates])
    assert torch.equal(w, x.cpu())
