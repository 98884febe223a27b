"""What rules do when clients are reordered, moved, turned, scaled or weighted."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation import (
    CAF,
    MDA,
    NNM,
    SMEA,
    Bulyan,
    CenteredClipping,
    FlagAggregator,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NearestNeighborAverage,
    PrincipalGradient,
    TrimmedMean,
)
from flcore.errors import InvalidInputError
from rule_list import GRAM, RULES, ident
from tables import TABLE

# ---- order of the clients ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "rule",
    [
        r
        for r in RULES
        if not isinstance(r, NearestNeighborAverage | MDA)
        and not (isinstance(r, Bulyan) and r.iterative)
    ]
    + [NNM(2) >> TrimmedMean(2), NNM(1) >> GeometricMedian()],
    ids=ident,
)
def test_any_order_of_the_clients_gives_the_same_bits(rule, dtype, rng):
    x = rng.standard_normal((9, 501)).astype(dtype)
    x[5] = x[2]  # one twice
    first = rule(x).tobytes()
    for _ in range(6):
        assert rule(x[rng.permutation(9)]).tobytes() == first


def test_bulyan_that_never_counts_a_single_neighbour_ignores_the_order_too(rng):
    x = rng.standard_normal((16, 300)).astype(np.float32)
    first = Bulyan(3)(x).tobytes()  # the last of its rounds has 7 rows and 2 neighbours
    for _ in range(6):
        assert Bulyan(3)(x[rng.permutation(16)]).tobytes() == first


@pytest.mark.parametrize(
    "rule", [GeometricMedian(), GeometricMedian("rfa"), CenteredClipping(9.0, 2), MultiKrum(1)]
)
def test_weighted_clients_may_come_in_any_order_too(rule, rng):
    x = rng.standard_normal((8, 300)).astype(np.float32)
    x[6] = x[1]  # the same update with another weight
    q = rng.integers(1, 100, 8).astype(float)
    first = rule(x, q).tobytes()
    for _ in range(6):
        p = rng.permutation(8)
        assert rule(x[p], q[p]).tobytes() == first


def test_diameter_ties_follow_the_order_of_the_call(rng):
    x = rng.standard_normal((9, 30))
    choices = {MDA(3).diagnose(x[np.roll(np.arange(9), k)]).selected for k in range(9)}
    assert len(choices) > 1
    pairs = ((x[:, None] - x) ** 2).sum(axis=2)
    spans = set()
    for k in range(9):
        rows = np.roll(np.arange(9), k)
        kept = rows[list(MDA(3).diagnose(x[rows]).selected)]
        spans.add(float(pairs[np.ix_(kept, kept)].max()))
    assert len(spans) == 1


@pytest.mark.parametrize("rule", [NearestNeighborAverage(2, pivot=3), Krum(1), MDA(2)], ids=ident)
def test_selection_moves_with_the_clients(rule, rng):
    x = rng.standard_normal((9, 20))
    x[[1, 7]] += 30
    p = rng.permutation(9)
    if isinstance(rule, NearestNeighborAverage):
        moved = NearestNeighborAverage(2, pivot=int(np.flatnonzero(p == 3)[0]))
    else:
        moved = rule
    assert {p[i] for i in moved.diagnose(x[p]).selected} == set(rule.diagnose(x).selected)


# ---- equivariance ------------------------------------------------------------------------------

FIXED_AT_ZERO = (CenteredClipping, FlagAggregator, PrincipalGradient)


@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_a_common_offset_moves_the_result_with_it(rule, rng):
    if isinstance(rule, FIXED_AT_ZERO) or rule == GeometricMedian("byzfl"):
        pytest.skip("works about the zero vector")
    x = rng.standard_normal((9, 60))
    shift = 5 * rng.standard_normal(60)
    np.testing.assert_allclose(rule(x + shift), rule(x) + shift, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rule", GRAM, ids=ident)
def test_a_rotation_rotates_the_result(rule, rng):
    if isinstance(rule, Bulyan):
        pytest.skip("works by coordinate")
    x = rng.standard_normal((9, 40)) + 0.3
    q = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    np.testing.assert_allclose(rule(x @ q), rule(x) @ q, atol=1e-7)


@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_a_scale_scales_the_result(rule, rng):
    x = rng.standard_normal((9, 40)) + 0.3
    if isinstance(rule, FlagAggregator):  # has no scale at all
        lengths = rng.uniform(0.1, 10, (9, 1))
        np.testing.assert_allclose(rule(lengths * x), rule(x), atol=1e-9)
    elif isinstance(rule, CenteredClipping):
        scaled = CenteredClipping(8 * rule.radius, rule.iterations)
        np.testing.assert_allclose(scaled(8 * x), 8 * rule(x), rtol=1e-9, atol=1e-12)
    elif rule in (GeometricMedian("byzfl"), GeometricMedian("rfa")):
        scaled = GeometricMedian(rule.convention, smoothing=8 * rule._option("smoothing"))
        np.testing.assert_allclose(scaled(8 * x), 8 * rule(x), rtol=1e-9, atol=1e-12)
    else:
        np.testing.assert_allclose(rule(8 * x), 8 * rule(x), rtol=1e-9, atol=1e-12)


# ---- weights -----------------------------------------------------------------------------------


def test_weights_average_the_selected_and_never_select(rng):
    x = rng.standard_normal((8, 20))
    q = np.array([1, 5, 2, 0, 3, 4, 1, 2.0])
    present = np.flatnonzero(q)
    seen = MultiKrum(1, 4).diagnose(x[present])
    rows = present[list(seen.selected)]
    np.testing.assert_allclose(MultiKrum(1, 4)(x, q), q[rows] @ x[rows] / q[rows].sum())
    np.testing.assert_array_equal(Krum(1)(x, q), Krum(1)(x[present]))


def test_weights_of_centres_are_example_counts(rng):
    x = rng.standard_normal((5, 20))
    q = np.array([1, 2, 3, 1, 2])
    repeated = np.repeat(x, q, axis=0)
    for rule in (
        GeometricMedian("byzfl"),
        GeometricMedian("rfa"),
        GeometricMedian(smoothing=1e-3),
        CenteredClipping(3.0),
        CenteredClipping(3.0, 4),
    ):
        # steps end when the point moves by less than 1e-10 of the distances
        loose = isinstance(rule, GeometricMedian) and rule.convention == "converged"
        np.testing.assert_allclose(rule(x, q), rule(repeated), atol=1e-8 if loose else 1e-9)


def test_a_client_without_weight_is_not_read(rng):
    x = rng.standard_normal((5, 8))
    x[3] = np.nan
    for rule in (GeometricMedian(), CenteredClipping(), MultiKrum(0, convention="flower")):
        q = np.array([1.0, 1, 1, 0, 1])
        np.testing.assert_allclose(rule(x, q), rule(np.delete(x, 3, axis=0)), rtol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [
        Bulyan(1),
        MDA(1),
        SMEA(1),
        CAF(1),
        NearestNeighborAverage(1),
        FlagAggregator(),
        PrincipalGradient(),
        Median(),
        TrimmedMean(1),
    ],
    ids=ident,
)
def test_rules_without_a_weighted_form_say_so(rule):
    with pytest.raises(InvalidInputError, match=r"weights: .* has no weighted form"):
        rule(TABLE, [1] * 6)
