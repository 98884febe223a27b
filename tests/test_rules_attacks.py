"""Rules under broken and hostile clients, and on sets with nothing to choose."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation import (
    CAF,
    MDA,
    SMEA,
    Bulyan,
    CenteredClipping,
    FlagAggregator,
    GeometricMedian,
    Krum,
    MeaMed,
    Median,
    MultiKrum,
    NearestNeighborAverage,
    Phocas,
    PrincipalGradient,
    TrimmedMean,
)
from flcore.errors import InvalidInputError, NonFiniteError
from rule_list import GRAM, RULES, ident

# ---- non-finite updates ------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", GRAM, ids=ident)
def test_a_broken_client_under_the_three_policies(rule, poison, rng):
    x = rng.standard_normal((8, 30)).astype(np.float32)
    x[5, 17] = poison
    with pytest.raises(NonFiniteError, match=r"updates\[5\]") as caught:
        rule(x)
    assert caught.value.clients == (5,)
    rest = np.delete(x, 5, axis=0)
    fields = {k: v for k, v in vars(rule).items() if k != "nonfinite"}
    fewer = {**fields, "f": 0} if "f" in fields else fields
    want = type(rule)(**fewer)(rest)
    for policy in ("exclude", "propagate"):  # the broken one counts as one of the f bad ones
        lenient = type(rule)(**fields, nonfinite=policy)
        np.testing.assert_allclose(lenient(x), want, rtol=1e-6, atol=1e-7)
    assert rule.diagnose(x).nonfinite == (5,)


def test_more_broken_clients_than_expected_leave_f_at_zero(rng):
    x = rng.standard_normal((9, 10))
    x[[0, 3, 4]] = np.nan
    good = np.delete(x, [0, 3, 4], axis=0)
    np.testing.assert_allclose(MDA(1, nonfinite="exclude")(x), good.mean(axis=0), rtol=1e-12)
    assert Krum(1, nonfinite="exclude").diagnose(x).nonfinite == (0, 3, 4)
    x[:] = np.nan
    for rule in (Krum(1, nonfinite="exclude"), GeometricMedian(nonfinite="propagate")):
        with pytest.raises(NonFiniteError, match="no client is left"):
            rule(x)
    seen = Krum(1).diagnose(x)
    assert seen.selected == () and seen.rejected == tuple(range(9)) == seen.nonfinite
    assert np.isinf(seen.norms).all()


def test_squares_beyond_float64_leave_a_client_out(rng):
    x = rng.standard_normal((7, 10))
    x[2] = 1e200
    with pytest.raises(NonFiniteError, match=r"updates\[2\].*overflow"):
        Krum(1)(x)
    got = MultiKrum(1, nonfinite="exclude").diagnose(x)
    assert 2 in got.rejected and got.nonfinite == (2,)


@pytest.mark.parametrize("rule", GRAM, ids=ident)
def test_values_near_the_end_of_float32_are_finite(rule, rng):
    x = rng.standard_normal((8, 30)).astype(np.float32)
    x[3] = 3e38
    x[3, ::2] = -3e38
    got = rule(x)
    assert np.isfinite(got).all()
    four_steps = getattr(rule, "convention", None) == "rfa"  # from a mean at 4e37: not arrived
    if not isinstance(rule, PrincipalGradient) and not four_steps:  # the former is not robust
        assert np.abs(got).max() < 20


# ---- small and degenerate sets -----------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=ident)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_updates_come_out_as_they_are(rule, value):
    x = np.full((9, 5), value)
    want = x[0]
    if isinstance(rule, FlagAggregator):
        want = 9 / 2 * x[0] / (np.linalg.norm(x[0]) or 1)
    if isinstance(rule, CenteredClipping) and value:
        want = x[0] * min(1, rule.iterations * 2 / np.linalg.norm(x[0]))
    np.testing.assert_allclose(rule(x), want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "rule",
    [
        GeometricMedian(),
        GeometricMedian("byzfl"),
        GeometricMedian("rfa"),
        CenteredClipping(),
        CenteredClipping(9.0, 3),
        MultiKrum(0, convention="flower"),
        MDA(0),
        SMEA(0),
        CAF(0),
        NearestNeighborAverage(0),
        FlagAggregator(rescale="mean-norm"),
        PrincipalGradient(),
        Median(),
        TrimmedMean(0),
    ],
    ids=ident,
)
def test_a_single_client_comes_out(rule):
    np.testing.assert_allclose(rule([np.array([1.0, -2.0])]), [1, -2], rtol=1e-12)


def test_two_clients(rng):
    x = rng.standard_normal((2, 6))
    for rule in (MDA(0), CAF(0), GeometricMedian(), GeometricMedian("rfa"), Median()):
        np.testing.assert_allclose(rule(x), x.mean(axis=0), rtol=1e-9)
    np.testing.assert_array_equal(Krum(0, "byzfl")(x), x[0])  # a tie


@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize(
    "rule",
    [Krum, MultiKrum, MDA, SMEA, CAF, NearestNeighborAverage, TrimmedMean, MeaMed, Phocas],
)
def test_half_of_the_clients_bad_is_an_error(rule, n):
    with pytest.raises(InvalidInputError, match=f"2 f < n, got f = {n // 2} and n = {n}"):
        rule(n // 2)(np.eye(n))


@pytest.mark.parametrize("rule", GRAM, ids=ident)
def test_hundred_clients_of_which_45_are_bad(rule):
    rng = np.random.default_rng(11)
    x = rng.standard_normal((100, 40)).astype(np.float32)
    x[rng.permutation(100)[:45]] += 50
    fields = {k: v for k, v in vars(rule).items() if k != "f"}
    if "f" not in vars(rule):
        got = rule(x)
    elif isinstance(rule, Bulyan):
        with pytest.raises(InvalidInputError, match=r"4 f \+ 3"):
            Bulyan(45)(x)
        got = Bulyan(24)(x)
        assert np.isfinite(got).all()
        return
    elif isinstance(rule, SMEA):
        with pytest.raises(InvalidInputError, match="subsets"):
            SMEA(45)(x)
        return
    elif isinstance(rule, NearestNeighborAverage):
        pivot = int(np.flatnonzero(x.mean(axis=1) < 25)[0])
        got = NearestNeighborAverage(45, pivot)(x)
    else:
        got = type(rule)(f=45, **fields)(x)
    assert np.isfinite(got).all()
    if isinstance(rule, Krum | MultiKrum | MDA | CAF | NearestNeighborAverage):
        assert np.abs(got).max() < 5
    if rule == GeometricMedian():
        assert np.abs(got).max() < 12  # pulled, not carried off


# ---- attacks -----------------------------------------------------------------------------------


def test_krum_never_chooses_the_outlier_of_a_crowd_far_from_zero():
    """Rows at 10 with a spread of 0.01, one client three times as far out: 1,000 draws."""
    rng = np.random.default_rng(0)
    for trial in range(1000):
        x = 1e-2 * rng.standard_normal((8, 24))
        attacker = trial % 8
        x[attacker] *= 3
        x = (x + 10).astype(np.float32)
        assert Krum(1).diagnose(x).selected != (attacker,)


@pytest.mark.parametrize("value", [1e6, 1e38, -3e38])
def test_bad_clients_are_not_in_the_selection(value, rng):
    x = rng.standard_normal((12, 30)).astype(np.float32)
    bad = [1, 4, 9]
    x[bad] = np.float32(value) * (1 + rng.random((3, 30), dtype=np.float32) / 8)
    x = np.clip(x, -3.4e38, 3.4e38)
    for rule in (Krum(3), MultiKrum(3), MultiKrum(3, convention="byzfl"), MDA(3), SMEA(3), CAF(3)):
        seen = rule.diagnose(x)
        assert not set(bad) & set(seen.selected)
        assert (seen.coefficients[bad] == 0).all()
    assert not set(bad) & set(NearestNeighborAverage(3).diagnose(x).selected)
    x = np.vstack([x, rng.standard_normal((3, 30)).astype(np.float32)])
    assert not set(bad) & set(Bulyan(3).diagnose(x).selected)


@pytest.mark.parametrize("far", [1e3, 1e6, 1e9, 1e20, 1e36])
@pytest.mark.parametrize(
    "rule", [GeometricMedian(), GeometricMedian("byzfl"), GeometricMedian("rfa")], ids=ident
)
def test_far_clients_move_the_geometric_median_by_a_bounded_amount(rule, far, rng):
    clean = rng.standard_normal((11, 200)).astype(np.float32)
    x = clean.copy()
    x[:4] = far * x[:4]
    distance = np.linalg.norm(rule(x).astype(np.float64) - clean[4:].mean(axis=0))
    if rule.convention == "rfa" and far > 1e3:
        assert distance < 40 * far  # four steps from a mean at 0.3 far: has not arrived
    else:
        assert distance < 30


def weiszfeld(x, nu, steps):
    z = np.zeros(x.shape[1])
    for _ in range(steps):
        b = 1 / np.maximum(nu, np.linalg.norm(x - z, axis=1))
        z = (b / b.sum()) @ x
    return z


@pytest.mark.parametrize("far", [1.0, 1e4, 1e8, 1e16, 1e34])
def test_iterates_are_exact_whatever_a_client_sends(far, rng):
    x = rng.standard_normal((9, 400))
    x[[2, 7]] *= far
    x = x.astype(np.float32)
    wide = x.astype(np.float64)
    got = GeometricMedian("byzfl", iterations=6, accumulate="float64")(x)
    np.testing.assert_allclose(got, weiszfeld(wide, 0.1, 6), rtol=1e-4, atol=2e-5)
    v = np.zeros(400)
    for _ in range(3):
        r = np.minimum(1, 15 / np.linalg.norm(wide - v, axis=1))
        v = v + (r[:, None] * (wide - v)).mean(axis=0)
    np.testing.assert_allclose(CenteredClipping(15.0, 3)(x), v, rtol=1e-4, atol=2e-5)


def test_one_client_moves_a_clipped_centre_by_two_radii_over_n(rng):
    x = rng.standard_normal((10, 30))
    for value in (0.0, 1e3, 1e100, -1e100):
        changed = x.copy()
        changed[4] = value
        rule = CenteredClipping(0.5)
        assert np.linalg.norm(rule(changed) - rule(x)) <= 2 * 0.5 / 10 * (1 + 1e-9)
