"""Clips that follow a quantile of the norms: the step, the budget, the noise on the count."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flcore.errors import InvalidInputError
from flcore.privacy import DPMean, update_noise_multiplier


def test_adaptive_clip_by_hand():
    # four of five updates are within 1: C = exp(-0.2 (0.8 - 0.5))
    updates = [np.float32([r]) for r in (0.1, 0.2, 0.3, 1.0, 5.0)]
    dp = DPMean(1.0, 0.0, quantile=0.5)
    dp(updates)
    assert dp.clip == pytest.approx(0.94176, abs=5e-6)
    weighted = DPMean(1.0, 0.0, quantile=0.5)
    weighted([*updates, np.float32([7])], [1, 2, 3, 4, 5, 0])  # counts heads; weight 0 is absent
    assert weighted.clip == dp.clip
    expecting = DPMean(1.0, 0.0, quantile=0.5, denominator=10)
    expecting(updates)  # b = 1/2 + (4 - 5/2) / 10
    assert expecting.clip == pytest.approx(math.exp(-0.2 * 0.15))


def test_adaptive_clip_finds_the_quantile():
    norms = np.exp(np.random.default_rng(1).standard_normal(200))
    updates = [np.float32([r, 0]) for r in norms]
    dp = DPMean(0.01, 0.5, 4, quantile=0.8, clip_lr=0.2)
    late = []
    for round in range(200):
        dp(updates)
        late += [dp.clip] if round >= 100 else []
    assert np.quantile(norms, 0.75) < np.mean(late) < np.quantile(norms, 0.85)


def test_the_budget_is_shared_between_sum_and_count():
    assert update_noise_multiplier(1.0, 5.0) == pytest.approx(1.00504, abs=5e-6)
    z, sigma = 1.3, 2.0
    total = update_noise_multiplier(z, sigma) ** -2 + (2 * sigma) ** -2
    assert total == pytest.approx(z**-2)
    updates = [np.float32([0.1, 0.2])] * 100
    adaptive = DPMean(1.0, 1.0, quantile=0.5).diagnose(updates)  # 100 / 20 = 5
    assert adaptive.noise_std == pytest.approx(1.00504 / 100, abs=1e-7)
    fixed = DPMean(1.0, 1.0, quantile=0.5, denominator=200).diagnose(updates)
    assert fixed.noise_std == pytest.approx(update_noise_multiplier(1.0, 10.0) / 200)
    given = DPMean(1.0, 1.0, quantile=0.5, count_noise=sigma).diagnose(updates)
    assert given.noise_std == pytest.approx(update_noise_multiplier(1.0, sigma) / 100)
    with pytest.raises(InvalidInputError, match=r"more than noise_multiplier / 2 = 0\.5, got 0\.5"):
        DPMean(1.0, 1.0, quantile=0.5)([np.float32([0.1, 0.2])] * 10)
    with pytest.raises(InvalidInputError, match="count_noise"):
        DPMean(1.0, 1.0, quantile=0.5, count_noise=0.4)


def test_noise_of_the_count():
    updates = [np.float32([0.5])] * 60 + [np.float32([2])] * 40
    shares = []
    for seed in range(400):
        dp = DPMean(1.0, 1.0, seed, quantile=0.5, clip_lr=1.0)
        dp(updates)
        shares.append(0.5 - math.log(dp.clip))
    assert np.mean(shares) == pytest.approx(0.6, abs=5 * 0.05 / 20)
    assert np.std(shares) == pytest.approx(0.05, abs=5 * 0.05 / math.sqrt(800))
    # it is none of the numbers the layers get
    dp = DPMean(1.0, 1.0, 0, quantile=0.5, clip_lr=1.0)
    noise = dp([[u] for u in updates])[0] - DPMean(1.0, 0.0)(updates)
    assert abs((shares[0] - 0.6) / 0.05) != pytest.approx(abs(noise[0] / 0.01), rel=0.01)


def test_clips_stay_finite():
    dp = DPMean(1.0, 0.0, quantile=0.0, clip_lr=1e9)
    for _ in range(5):
        dp([np.float32([0])])
    assert dp.clip == 2.0**-100
    up = DPMean(1.0, 0.0, quantile=1.0, clip_lr=1e9)
    for _ in range(5):
        up([np.float32([3e38])])
    assert up.clip == 2.0**100
