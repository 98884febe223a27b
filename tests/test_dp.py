"""Private means: clipping, noise, who pays for it, state, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

import flcore
from flcore import _variants
from flcore.aggregation import Mean
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops import random_normal
from flcore.ops._combine_step import SERVER_STREAM, Noise, Step, combine_step
from flcore.privacy import DPMean
from support import DTYPES, EPS, HAS_TORCH, np_dtype, outputs_per_level, unaligned

VARIANTS = [v for v, why in _variants.available("combine_step", "cpu").items() if not why]
PAIR = [np.float32([3, 4]), np.float32([0.3, 0.4])]


def clients(n: int, size: int, seed: int = 0, spread: float = 1.0) -> list[np.ndarray]:
    """Return `n` updates whose norms lie around 1, half of them above."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, size)) / math.sqrt(size)
    return list((rows * np.exp(spread * rng.standard_normal((n, 1)))).astype(np.float32))


def clipped_mean(updates, clip, weights=None):
    """Return the definition in float64: each row of `updates` within the ball, then the mean."""
    rows = np.stack([np.asarray(u, np.float64).ravel() for u in updates])
    norms = np.sqrt((rows**2).sum(axis=1))
    factors = np.array([min(1.0, clip / r) if r else 1.0 for r in norms])
    return np.average(rows * factors[:, None], axis=0, weights=weights)


# ---- clipping ----------------------------------------------------------------------------------


def test_by_hand():
    # (3, 4) has norm 5 and comes in as (0.6, 0.8); (0.3, 0.4) has 0.5 and stays
    assert DPMean(1.0, 0.0)(PAIR) == pytest.approx([0.45, 0.6], abs=1e-7)
    terms = DPMean(1.0, 1.1).diagnose(PAIR)
    assert terms.norms == pytest.approx([5, 0.5])
    assert terms.scales == pytest.approx([0.2, 1])
    assert terms.noise_std == pytest.approx(0.55)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_mean_of_clipped_updates(variant, dtype):
    for size in (1, 33, 4097):
        updates = [unaligned(u.astype(np_dtype(dtype))) for u in clients(5, size)]
        got = DPMean(0.7, 0.0)(updates, variant=variant)
        assert got.dtype == updates[0].dtype
        want = clipped_mean(updates, 0.7)
        tolerance = 2 * max(EPS[dtype], 2.0**-23) * np.abs(want).max()
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_without_clip_and_noise_it_is_the_mean_bit_for_bit(dtype):
    updates = [u.astype(dtype) for u in clients(7, 1001)]
    weights = [1, 0, 3, 2.5, 10, 1, 1]
    for w in (None, weights):
        got = DPMean(math.inf, 0.0)(updates, w)
        assert got.tobytes() == (Mean()(updates, w) + np.zeros(1, dtype)).tobytes()  # -0 is 0


def test_the_norm_is_that_of_all_layers_together():
    update = {"a": np.float32([[3, 0]]), "b": np.float32([0, 4, 0])}
    mean = DPMean(1.0, 0.0)([update, update])
    assert list(mean) == ["a", "b"] and mean["a"].shape == (1, 2)
    assert mean["a"].ravel() == pytest.approx([0.6, 0])
    assert mean["b"] == pytest.approx([0, 0.8, 0])


def test_norms_after_clipping_and_rows_that_are_not_touched():
    for seed in range(20):
        (update,) = clients(1, 997, seed=seed)
        norm = np.linalg.norm(update.astype(np.float64))
        got = DPMean(1.0, 0.0)([update])
        assert np.linalg.norm(got.astype(np.float64)) <= 1 + 1e-6
        if norm <= 1:
            assert got.tobytes() == update.tobytes()
    assert np.linalg.norm(got) > 0.2


def test_zero_updates_and_extreme_norms():
    zero = np.zeros(3, np.float32)
    assert DPMean(1.0, 0.0)([zero, zero]).tolist() == [0, 0, 0]
    largest = np.full(3, 3.4e38, np.float32)
    smallest = np.full(3, 1e-45, np.float32)
    for clip in (1.0, 1e-3):  # the factor of `largest` is below the normal range of float32
        got = DPMean(clip, 0.0)([largest, zero, smallest]).astype(np.float64)
        np.testing.assert_allclose(got, clip / 3 / math.sqrt(3), rtol=1e-6)
    beyond = np.full(3, 1e200)  # its square is infinite: it must not come in unclipped
    assert np.abs(DPMean(1.0, 0.0)([beyond, np.zeros(3)])).max() <= 1


def test_what_comes_in_and_where_it_goes():
    rows = np.stack(clients(4, 12)).reshape(4, 3, 4)
    want = DPMean(1.0, 0.0)(list(rows))
    assert DPMean(1.0, 0.0)(rows).tobytes() == want.tobytes()
    assert DPMean(1.0, 0.0)(iter(list(rows))).tobytes() == want.tobytes()
    out = rows[0]  # may be one of the updates
    assert DPMean(1.0, 0.0)(list(rows), out=out) is out and out.tobytes() == want.tobytes()
    strided = np.stack(clients(4, 12), axis=1)
    strided.setflags(write=False)
    got = DPMean(1.0, 0.0)([strided[:, i] for i in range(4)])
    assert got.tobytes() == want.tobytes()
    with pytest.raises(DTypeError, match="int64"):
        DPMean(1.0, 0.0)([np.arange(3)])


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch_tensors():
    import torch

    updates = clients(3, 50)
    want = DPMean(1.0, 1.0, 5)(updates)
    got = DPMean(1.0, 1.0, 5)([torch.from_numpy(u) for u in updates])
    assert isinstance(got, torch.Tensor) and got.numpy().tobytes() == want.tobytes()


# ---- noise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_is_that_of_the_streams_of_the_round(variant):
    updates = [[u[:700], u[700:]] for u in clients(4, 1000)]
    dp = DPMean(0.5, 2.0, 9)
    dp.round = 3
    noisy = dp(updates, variant=variant)
    plain = DPMean(0.5, 0.0)(updates, variant=variant)
    for layer, (x, y) in enumerate(zip(noisy, plain, strict=True)):
        z = random_normal(x.size, 9, round=3, tensor=layer, client=SERVER_STREAM)
        np.testing.assert_allclose(x - y, 2.0 * 0.5 / 4 * z, rtol=0, atol=2e-7)


def test_noise_has_the_size_of_the_definition():
    zeros = [np.zeros(1_000_000, np.float32)] * 2
    noise = DPMean(1.0, 1.1, 1)(zeros).astype(np.float64)
    assert abs(noise.mean()) < 5 * 0.55 / 1000
    assert abs(noise.std() / 0.55 - 1) < 0.005


LEVELS_SCRIPT = """
import hashlib
import numpy as np
from flcore.privacy import DPMean
updates = [np.sin(np.arange(200_003, dtype=np.float32) * k) for k in (1, 2, 3)]
print(hashlib.sha256(DPMean(1.0, 1.0, 7)(updates).tobytes()).hexdigest())
"""


def test_levels_and_thread_counts_give_identical_bits():
    printed = outputs_per_level(LEVELS_SCRIPT)
    assert len(set(printed.values())) == 1, printed
    updates = clients(3, 200_003)
    results = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        results.add(DPMean(1.0, 1.0, 7)(updates).tobytes())
    assert len(results) == 1


def test_noise_is_never_used_twice():
    dp = DPMean(1.0, 1.0, 7)
    updates = clients(3, 100)
    seen = {dp(updates).tobytes() for _ in range(5)}
    assert len(seen) == 5 and dp.round == 5
    with pytest.raises(InvalidInputError, match="round: expected one from 5 to 4294967295, got 4"):
        dp(updates, round=4)
    assert dp(updates, round=8).tobytes() not in seen and dp.round == 9
    # a call that fails after the noise has been named uses its round up
    with pytest.raises(InvalidInputError, match="out"):
        dp(updates, out=np.zeros(99, np.float32))
    assert dp.round == 10
    # one that fails before has drawn nothing
    with pytest.raises(NonFiniteError):
        dp([*updates[:2], np.full(100, np.nan, np.float32)])
    assert dp.round == 10
    dp.diagnose(updates)
    assert dp.round == 10
    dp(updates, round=2**32 - 1)
    with pytest.raises(InvalidInputError, match="round"):
        dp(updates)


def test_seeds():
    updates = clients(3, 100)
    assert DPMean(1.0, 1.0, 7)(updates).tobytes() == DPMean(1.0, 1.0, 7)(updates).tobytes()
    assert DPMean(1.0, 1.0, 8)(updates).tobytes() != DPMean(1.0, 1.0, 7)(updates).tobytes()
    drawn = [DPMean(1.0, 1.0) for _ in range(3)]  # from the operating system
    assert len({dp(updates).tobytes() for dp in drawn}) == 3
    assert "987654321" not in repr(DPMean(1.0, 1.0, 987654321)) + str(
        DPMean(1.0, 1.0, 987654321).state_dict()
    )


def test_a_server_step_along_the_noisy_mean():
    updates, model = clients(4, 300), clients(1, 300, seed=5)[0]
    dp = DPMean(0.5, 1.0, 3)
    terms = dp.diagnose(updates)
    m = np.ones(300, np.float32)
    got = dp.step(updates, model, Step("momentum", lr=0.5), m=m, cast="float16")
    want = combine_step(
        updates,
        list(terms.shares),
        model,
        Step("momentum", lr=0.5),
        m=m,
        noise=Noise(0.5 / 4, 3, 0),
        cast="float16",
    )
    for x, y in zip(got[:2], want[:2], strict=True):
        assert x.tobytes() == y.tobytes()
    assert got.cast.dtype == np.float16 and dp.round == 1
    # sgd with learning rate 1 from zeros is the mean itself
    zero = np.zeros(300, np.float32)
    step = DPMean(0.5, 1.0, 3).step(updates, zero, Step("sgd")).model
    assert step.tobytes() == DPMean(0.5, 1.0, 3)(updates).tobytes()
    with pytest.raises(InvalidInputError, match="noise: not a buffer"):
        dp.step(updates, model, Step("sgd"), noise=None)


# ---- weights: what one client can change -------------------------------------------------------


def test_noise_covers_the_largest_weight():
    weights = [8, 1, 1]
    terms = DPMean(2.0, 1.5).diagnose(clients(3, 10), weights)
    assert terms.noise_std == pytest.approx(1.5 * 2.0 * 0.8)  # not 1.5 * 2.0 / 3
    np.testing.assert_allclose(terms.shares / terms.scales, [0.8, 0.1, 0.1])


@pytest.mark.parametrize("weights", [None, [8, 1, 1, 2]])
def test_one_update_moves_the_mean_by_no_more_than_the_noise_is_for(weights):
    z = 3.0
    for seed in range(10):
        updates = clients(4, 50, seed=seed, spread=3)
        bound = DPMean(0.7, z).diagnose(updates, weights).noise_std / z
        mean = DPMean(0.7, 0.0)(updates, weights).astype(np.float64)
        moved = []
        for i in range(4):
            others = [*updates[:i], np.zeros(50, np.float32), *updates[i + 1 :]]
            moved.append(np.linalg.norm(DPMean(0.7, 0.0)(others, weights) - mean))
        assert max(moved) <= bound * (1 + 1e-6)
    heaviest = 0 if weights is None else int(np.argmax(weights))
    long = [np.full(50, 9, np.float32) if i == heaviest else u for i, u in enumerate(updates)]
    terms = DPMean(0.7, z).diagnose(long, weights)  # and the bound is reached
    assert terms.shares[heaviest] * terms.norms[heaviest] == pytest.approx(terms.noise_std / z)


def test_with_a_fixed_denominator_nothing_but_the_sum_depends_on_who_is_there():
    updates = clients(5, 50, spread=3)
    fixed = DPMean(1.0, 2.0, denominator=4)
    with_all, without = fixed.diagnose(updates), fixed.diagnose(updates[:4])
    assert with_all.noise_std == without.noise_std == 2.0 / 4
    assert with_all.shares[:4].tobytes() == without.shares.tobytes()
    capped = DPMean(1.0, 2.0, denominator=10, weight_cap=3)
    with_all, without = (
        capped.diagnose(updates, [1, 2, 1, 1, 9]),
        capped.diagnose(updates[:4], [1, 2, 1, 1]),
    )
    assert with_all.noise_std == without.noise_std == 2.0 * 3 / 10
    assert with_all.shares[:4].tobytes() == without.shares.tobytes()
    assert with_all.shares[4] == pytest.approx(3 / 10 * with_all.scales[4])


# ---- values that are not finite ----------------------------------------------------------------


def test_nonfinite_updates():
    updates = clients(4, 20)
    bad = [*updates[:2], np.full(20, np.inf, np.float32), updates[3]]
    with pytest.raises(NonFiniteError, match=r"updates\[2\]") as caught:
        DPMean(1.0, 1.0)(bad)
    assert caught.value.clients == (2,)
    # left out is the same as zero: neither the divisor nor the noise tells
    zero = [*updates[:2], np.zeros(20, np.float32), updates[3]]
    for weights in (None, [1, 1, 5, 1]):
        got = DPMean(1.0, 1.0, 3, nonfinite="exclude")(bad, weights)
        assert got.tobytes() == DPMean(1.0, 1.0, 3)(zero, weights).tobytes()
    # a client of weight 0 is not there
    ignored = DPMean(1.0, 1.0, 3)(bad, [1, 1, 0, 1])
    assert ignored.tobytes() == DPMean(1.0, 1.0, 3)([*updates[:2], updates[3]]).tobytes()
    alone = DPMean(1.0, 1.0, 3, nonfinite="exclude")([bad[2]])
    np.testing.assert_allclose(alone, random_normal(20, 3, client=SERVER_STREAM), rtol=1e-6)


# ---- state and arguments -----------------------------------------------------------------------


def test_state_goes_on_bit_for_bit_and_never_back():
    updates = clients(40, 30)
    dp = DPMean(1.0, 1.0, 3, quantile=0.5)
    for _ in range(3):
        dp(updates)
    state = dp.state_dict()
    twin = DPMean(9.0, 1.0, 3, quantile=0.5)
    twin.load_state_dict(state)
    assert twin(updates).tobytes() == dp(updates).tobytes() and twin.clip == dp.clip
    with pytest.raises(InvalidInputError, match="expected 4 or later, got 3"):
        dp.load_state_dict(state)
    for wrong, says in (
        ({"round": 5}, "expected the keys"),
        ({"round": 5.5, "clip": 1.0}, "state\\['round'\\]"),
        ({"round": 5, "clip": -1.0}, "state\\['clip'\\]"),
        ({"round": 5, "clip": math.inf}, "state\\['clip'\\]"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            dp.load_state_dict(wrong)
        assert dp.round == 4
    free = DPMean(math.inf, 0.0)
    free.load_state_dict(free.state_dict())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"clip": 0}, "clip: expected a finite number in \\(0, inf\\)"),
        ({"clip": -1}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"clip": math.inf}, "clip: expected a finite number with noise"),
        ({"clip": math.inf, "noise_multiplier": 0, "quantile": 0.5}, "adaptive"),
        ({"noise_multiplier": -0.1}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"denominator": 0}, "denominator"),
        ({"weight_cap": 0}, "weight_cap"),
        ({"quantile": 1.5}, "quantile"),
        ({"clip_lr": -1}, "clip_lr"),
        ({"count_noise": -1}, "count_noise"),
        ({"accumulate": "float16"}, "accumulate: expected one of"),
        ({"nonfinite": "propagate"}, "nonfinite: expected one of"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    with pytest.raises(InvalidInputError, match=says):
        DPMean(**{"clip": 1.0, "noise_multiplier": 1.0, **arguments})


def test_bad_calls_are_named():
    dp = DPMean(1.0, 1.0)
    for call, says in (
        (lambda: dp([]), "updates"),
        (lambda: dp(PAIR, [1, -1]), "weights\\[1\\]"),
        (lambda: dp(PAIR, [0, 0]), "positive sum"),
        (lambda: dp(PAIR, [1]), "weights"),
        (lambda: dp(PAIR, round=-1), "round"),
        (lambda: dp(PAIR, variant="fpga"), "fpga"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            call()
