"""Accounting: closed forms, published values, monotony, calibration, what cannot be bounded."""

from __future__ import annotations

import math
import sys

import pytest

from flcore.errors import InvalidInputError, MissingDependencyError
from flcore.privacy import epsilon, noise_multiplier_for

pytest.importorskip("dp_accounting")


def gaussian_epsilon(z: float, delta: float) -> float:
    """Return epsilon of one Gaussian mechanism, from the exact trade-off (Balle, Wang, 2018)."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    def excess(e: float) -> float:
        below = norm.cdf(1 / (2 * z) - e * z)
        return below - math.exp(e) * norm.cdf(-1 / (2 * z) - e * z) - delta

    return brentq(excess, 0, 100)


def test_epsilon_of_the_gaussian_mechanism():
    for z in (0.7, 4.0):
        exact = gaussian_epsilon(z, 1e-5)
        tight = epsilon(z, 1.0, 1, 1e-5, accountant="pld")
        assert exact <= tight < exact * 1.001
        assert exact < epsilon(z, 1.0, 1, 1e-5) < exact * 1.15
        # T rounds with sqrt(T) times the noise are one round
        assert epsilon(z * 10, 1.0, 100, 1e-5) == pytest.approx(epsilon(z, 1.0, 1, 1e-5))
        assert epsilon(z, 1.0, 1, 1e-5, neighbouring="zero_out") == epsilon(z, 1.0, 1, 1e-5)
        # with another client in its place the sum moves twice as far
        for accountant in ("rdp", "pld"):
            replaced = epsilon(2 * z, 1, 1, 1e-5, neighbouring="replace", accountant=accountant)
            assert replaced == pytest.approx(epsilon(z, 1, 1, 1e-5, accountant=accountant))


def test_epsilon_of_sampled_rounds():
    # published values of the Renyi accountant; orders differ a little between libraries
    for z, q, rounds, want in (
        (1, 0.01, 1000, 2.1014),
        (1, 0.1, 100, 7.8993),
        (2, 0.02, 500, 1.0153),
    ):
        assert epsilon(z, q, rounds, 1e-5) == pytest.approx(want, rel=1e-3)
    # from the binomial sum at integer orders (Mironov et al., 2019, section 3.3)
    z, q, rounds = 1.0, 0.1, 100
    best = math.inf
    for a in range(2, 30):
        moment = math.fsum(
            math.comb(a, i) * (1 - q) ** (a - i) * q**i * math.exp((i * i - i) / (2 * z * z))
            for i in range(a + 1)
        )
        renyi = rounds * math.log(moment) / (a - 1)
        best = min(best, renyi - math.log(1e-5 * a) / (a - 1) + math.log((a - 1) / a))
    assert epsilon(z, q, rounds, 1e-5) == pytest.approx(best, rel=0.02)
    assert epsilon(z, q, rounds, 1e-5, accountant="pld") < epsilon(z, q, rounds, 1e-5)


def test_epsilon_grows_with_sampling_and_rounds_and_falls_with_noise():
    base = epsilon(1.0, 0.1, 10, 1e-5)
    assert epsilon(1.0, 0.2, 10, 1e-5) > base
    assert epsilon(1.0, 0.1, 20, 1e-5) > base
    assert epsilon(1.0, 0.1, 10, 1e-6) > base
    assert epsilon(1.5, 0.1, 10, 1e-5) < base
    assert epsilon(1.0, 0.1, 0, 1e-5) == 0
    assert epsilon(0.0, 0.1, 10, 1e-5) == math.inf
    # a fixed cohort is another mechanism, here with neighbours that differ by two clips
    fixed = epsilon(1.0, 0.1, 10, 1e-5, sampling="fixed", neighbouring="replace")
    swapped = epsilon(1.0, 0.1, 10, 1e-5, neighbouring="replace", accountant="pld")
    assert fixed > swapped > epsilon(1.0, 0.1, 10, 1e-5, accountant="pld")
    everybody = epsilon(1.0, 1.0, 10, 1e-5, sampling="fixed", neighbouring="replace")
    assert everybody == epsilon(0.5, 1.0, 10, 1e-5)


@pytest.mark.parametrize("target", [0.3, 3.0])
def test_calibration_is_the_smallest_multiplier_that_does(target):
    z = noise_multiplier_for(target, 0.05, 50, 1e-5)
    assert epsilon(z, 0.05, 50, 1e-5) <= target < epsilon(z * 0.998, 0.05, 50, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"noise_multiplier": -1}, "noise_multiplier"),
        ({"sampling_rate": 0}, "sampling_rate: expected a finite number in \\(0, 1\\]"),
        ({"sampling_rate": 1.1}, "sampling_rate"),
        ({"rounds": 1.5}, "rounds"),
        ({"delta": 0}, "delta"),
        ({"delta": 1}, "delta"),
        ({"neighbouring": "swap"}, "neighbouring: expected one of"),
        ({"sampling": "shuffle"}, "sampling: expected one of"),
        ({"accountant": "gdp"}, "accountant: expected one of"),
        ({"neighbouring": "replace"}, "'pld' only"),
        ({"sampling": "fixed"}, "neighbouring='replace' and accountant='rdp' only"),
        ({"sampling": "fixed", "neighbouring": "replace", "accountant": "pld"}, "'rdp' only"),
    ],
)
def test_bad_arguments_of_the_accountant_are_named(arguments, says):
    good = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "rounds": 10, "delta": 1e-5}
    with pytest.raises(InvalidInputError, match=says):
        epsilon(**{**good, **arguments})


def test_calibration_says_what_it_cannot_do():
    with pytest.raises(InvalidInputError, match="epsilon: expected a finite number in \\(0"):
        noise_multiplier_for(0.0, 0.1, 10, 1e-5)
    with pytest.raises(InvalidInputError, match="rounds"):
        noise_multiplier_for(1.0, 0.1, 0, 1e-5)
    with pytest.raises(InvalidInputError, match="no noise multiplier up to 2\\^20"):
        noise_multiplier_for(1e-6, 1.0, 1000, 1e-12)


def test_accounting_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)  # import then says it is not there
    with pytest.raises(MissingDependencyError, match=r"pip install 'flcore\[privacy\]'"):
        epsilon(1.0, 0.1, 10, 1e-5)
