"""The linear step of a server: worked numbers, the methods it covers, bits, non-finite state."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from flcore import _variants
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops import Step, combine_step
from server_problem import flat, problem
from support import DTYPES, outputs_per_level
from test_packet_rules import clients, decode

VARIANTS = [v for v, why in _variants.available("combine_step", "cpu").items() if not why]
WEIGHTS = np.full(4, 0.25)


def run(step: Step, rounds: np.ndarray, w: np.ndarray, **options):
    """Model and state after some rounds of mean updates, float64."""
    m = None
    for updates in rounds:
        result = combine_step(list(updates), WEIGHTS, w, step, m=m, accumulate="float64", **options)
        w, m = result.model, result.m
        assert result.v is None
    return w, m


@pytest.mark.parametrize("variant", ["cpu", "reference"])
def test_two_rounds_by_hand(variant):
    """D = 1 and 3: m = 2 and 7 (a = 1/2, b = 2), w = 1 + 3 + 0.2 and 4.2 + 9 + 0.7."""
    step = Step.linear(a=0.5, b=2.0, c=3.0, e=0.1)
    assert step == Step("linear", lr=3.0, beta1=0.5, beta2=2.0, tau=0.1) and step.states == ("m",)
    rounds = np.array([1.0, 3.0]).reshape(2, 1, 1).repeat(4, axis=1)
    w, m = run(step, rounds[:1], np.ones(1), variant=variant)
    assert np.isclose(w[0], 4.2) and m[0] == 2.0
    w, m = run(step, rounds, np.ones(1), variant=variant)
    assert np.isclose(w[0], 13.9) and m[0] == 7.0


def test_servers_that_it_covers(rng):
    """Written out by their definitions, with S = 4 of N = 10 clients, K steps of lr."""
    rounds, w0 = rng.standard_normal((5, 4, 30)), rng.standard_normal(30)
    share, k_lr = 0.4, 7 * 0.05
    mean = rounds.mean(1)

    w, h = w0, np.zeros(30)  # FedDyn: h += sum u / N, w = mean of x_i + h
    for d in mean:
        h = h + share * d
        w = w + d + h
    got = run(Step.linear(a=1.0, b=share, c=1.0, e=1.0), rounds, w0)
    np.testing.assert_allclose(got, (w, h), rtol=1e-12)

    w, c = w0, np.zeros(30)  # SCAFFOLD: c += |S|/N mean(c_i' - c_i), c_i' - c_i = -c - u / (K lr)
    for d in mean:
        c = c + share * (-c - d / k_lr)
        w = w + 0.8 * d
    got = run(Step.linear(a=1 - share, b=-share / k_lr, c=0.8), rounds, w0)
    np.testing.assert_allclose(got, (w, c), rtol=1e-11, atol=1e-13)

    w = w0 + mean.sum(0)  # FedCM: the direction is the last mean gradient
    got = run(Step.linear(a=0.0, b=-1 / k_lr), rounds, w0)
    np.testing.assert_allclose(got, (w, -mean[-1] / k_lr), rtol=1e-12)

    beta = 0.9  # server momentum
    got = run(Step.linear(a=beta, b=1.0, c=0.0, e=0.5), rounds, w0)
    want = run(Step("momentum", lr=0.5, beta1=beta), rounds, w0)
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_it_is_the_mean_where_the_state_counts_for_nothing(rng):
    case = problem(rng, 700, "float32", "float32", "linear", n=6)
    plain = {name: x for name, x in case.items() if name != "m"}
    got = combine_step(step=Step.linear(c=0.5), **case)
    assert got.model.tobytes() == combine_step(step=Step("sgd", lr=0.5), **plain).model.tobytes()
    assert got.m.tobytes() == case["m"].tobytes()


def test_instruction_sets_and_threads_give_identical_bits():
    script = """
import numpy as np, flcore, hashlib
from flcore.ops import Step, combine_step
rng, digest = np.random.default_rng(2), hashlib.sha256()
cases = ((np.float32, 2101), (np.float64, 2101), (np.float16, 2101), (np.float32, 90_001))
for dtype, size in cases:
    rows = [rng.standard_normal(size).astype(dtype) for _ in range(5)]
    w = rng.standard_normal(size).astype(dtype)
    m = rng.standard_normal(size).astype(np.float64 if dtype == np.float64 else np.float32)
    for threads in (1, 3):
        flcore.set_num_threads(threads)
        got = combine_step(rows, rng.uniform(0, 1, 5) if threads < 3 else [1, 2, 3, 4, 5], w,
                           Step.linear(a=.7, b=-.3, c=.9, e=.2), m=m, cast="float16")
        for x in (got.model, got.m, got.cast):
            digest.update(x.tobytes())
print(digest.hexdigest())
"""
    assert len(set(outputs_per_level(script).values())) == 1


@pytest.mark.skipif("triton" not in VARIANTS, reason="there is a GPU, or no triton")
@pytest.mark.parametrize("model", DTYPES[:2])
def test_triton_gives_the_bits_of_the_cpu_kernel(model, rng):
    import torch

    case = problem(rng, 1300, model, model, "linear", n=3)
    case["updates"] = [torch.from_numpy(x) for x in case["updates"]]
    case |= {name: torch.from_numpy(case[name]) for name in ("model", "m")}
    step = Step.linear(a=0.7, b=-0.3, c=0.9, e=0.2)
    digests = set()
    for variant in ("triton", "cpu"):
        got = combine_step(step=step, **case, variant=variant)
        digests.add(hashlib.sha256(got.model.numpy().tobytes() + got.m.numpy().tobytes()).digest())
    assert len(digests) == 1


def test_packets_give_the_bits_of_their_values(rng):
    packets = clients(6, 3000)
    model, m = rng.standard_normal((2, 3000)).astype(np.float32)
    step, weights = Step.linear(a=0.7, b=-0.3, c=0.9, e=0.2), [1, 2, 0, 1, -1, 1]
    got = combine_step(packets, weights, model, step, m=m)
    want = combine_step([decode(p) for p in packets], weights, model, step, m=m)
    assert flat(got) == flat(want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_that_overflows_is_seen_though_the_model_does_not_take_it(variant):
    w, d = np.ones(40, np.float32), np.zeros(40, np.float32)
    m = np.zeros(40, np.float32)
    m[33] = 3e38
    given = (w, d, m)
    if variant == "triton":
        torch = pytest.importorskip("torch")
        given = tuple(torch.from_numpy(x) for x in given)
    w, d, m = given
    with pytest.raises(NonFiniteError, match="the step overflows"):
        combine_step([d], [1.0], w, Step.linear(a=10.0), m=m, variant=variant)
    got = combine_step([d], [1.0], w, Step.linear(a=1.0), m=m, variant=variant)
    assert (got.model == w).all()


def test_numbers_are_checked():
    with pytest.raises(InvalidInputError, match="beta2: expected a finite number"):
        Step.linear(b=np.nan)
