"""Spread and subspaces of client rows: worked numbers, and brute force on the rows themselves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flcore.aggregation._geometry import Geometry
from flcore.aggregation._solvers import spread
from flcore.aggregation._solvers.spread import filter_weights, least_spread_subset
from flcore.aggregation._solvers.subspace import (
    FLOOR,
    flag_coefficients,
    principal_coefficients,
    unit_products,
)
from flcore.errors import InvalidInputError
from tables import SEVEN, STEPS, TABLE


def squares_of(x: np.ndarray) -> np.ndarray:
    return ((x[:, None] - x[None, :]) ** 2).sum(axis=2)


def geometry_of(x: np.ndarray) -> Geometry:
    return Geometry.of(squares_of(x), (x**2).sum(axis=1))


# ---- spread ------------------------------------------------------------------------------------


def top_variance(x: np.ndarray, p: np.ndarray) -> float:
    z = x - p @ x / p.sum()
    return float(np.linalg.eigvalsh((z.T * p) @ z / p.sum())[-1])


@pytest.mark.parametrize(("n", "f", "d"), [(8, 2, 3), (9, 4, 20), (11, 3, 5), (12, 1, 40)])
@pytest.mark.parametrize("attack", [0.0, 10.0])
def test_least_spread_equals_enumeration(n, f, d, attack):
    for trial in range(3):
        rng = np.random.default_rng([n, d, trial])
        x = rng.standard_normal((n, d))
        x[rng.permutation(n)[:f]] += attack
        rows, value = least_spread_subset(geometry_of(x).frame[:n, :n], n - f, 10**6)
        want = min(
            itertools.combinations(range(n), n - f),
            key=lambda s: top_variance(x[list(s)], np.ones(len(s))),
        )
        assert tuple(rows) == want
        np.testing.assert_allclose(value, top_variance(x[rows], np.ones(n - f)), rtol=1e-9)


def test_least_spread_by_hand():
    frame = geometry_of(TABLE).frame[:6, :6]
    rows, value = least_spread_subset(frame, 5, 10)
    assert list(rows) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(value, 0.0668257688801293, rtol=1e-12)
    rows, value = least_spread_subset(frame, 4, 15)
    assert list(rows) == [0, 1, 2, 3]
    np.testing.assert_allclose(value, 0.0382758316123207, rtol=1e-12)


def test_least_spread_ties_go_to_the_first_subset():
    assert list(least_spread_subset(geometry_of(STEPS).frame[:3, :3], 2, 10)[0]) == [0, 1]
    for keep in (1, 3, 5):
        same = least_spread_subset(np.zeros((5, 5)), keep, 10)
        assert list(same[0]) == list(range(keep)) and same[1] == 0
    twice = np.repeat([[0.0, 9.0], [5.0, 1.0], [2.0, 2.0]], 2, axis=0)  # three pairs
    assert list(least_spread_subset(geometry_of(twice).frame[:6, :6], 2, 15)[0]) == [0, 1]


def test_least_spread_of_too_many_subsets_is_an_error():
    with pytest.raises(InvalidInputError, match=r"4845 subsets.*max_subsets = 4844"):
        least_spread_subset(np.eye(20), 16, 4844)


def filtered_on_rows(x: np.ndarray, f: int, removed_count: bool) -> tuple[np.ndarray, float, int]:
    n, c = len(x), np.ones(len(x))
    best, least, steps = c / n, np.inf, 0
    while c.sum() > n - 2 * f + 1e-9:
        z = x - c @ x / c.sum()
        values, vectors = np.linalg.eigh((z.T * c) @ z / c.sum())
        if values[-1] < least:
            best, least = c / c.sum(), values[-1]
        tau = (z @ vectors[:, -1]) ** 2
        c = c * (1 - tau / (tau if removed_count else tau[c > 0]).max())
        steps += 1
    return best, least, steps


def test_filter_by_hand():
    """The numbers of the reference library's rule, made exact: removed rows count."""
    weights = filter_weights(geometry_of(TABLE).frame[:6, :6], 1, removed_count=True)
    want = [0.24006049, 0.18164087, 0.21513589, 0.20958313, 0.15357961, 0]
    np.testing.assert_allclose(weights, want, atol=5e-9)
    np.testing.assert_allclose(top_variance(TABLE, weights), 0.0590588575932793, rtol=1e-9)
    mean = [1.00505698, 1.99494302, -1.03406542, 0.49214880]
    np.testing.assert_allclose(weights @ TABLE, mean, atol=5e-9)
    for removed_count in (False, True):
        centre = filter_weights(geometry_of(STEPS).frame[:3, :3], 1, removed_count=removed_count)
        np.testing.assert_allclose(centre @ STEPS, [4, 5, 6], rtol=1e-12)


@pytest.mark.parametrize(("n", "f", "d"), [(8, 3, 4), (15, 4, 6), (32, 5, 10)])
@pytest.mark.parametrize("attack", [0.0, 3.0, 1e3])
def test_filter_equals_the_filter_on_the_rows(n, f, d, attack):
    rng = np.random.default_rng([n, d])
    x = rng.standard_normal((n, d))
    x[:f] += attack * rng.standard_normal((f, d))
    want, least, steps = filtered_on_rows(x, f, False)
    assert 1 <= steps <= 2 * f  # a row leaves in each
    weights = filter_weights(geometry_of(x).frame[:n, :n], f)
    np.testing.assert_allclose(weights, want, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(top_variance(x, weights), least, rtol=1e-6)
    if attack == 1e3:
        assert weights[:f].max() < 1e-6 and (weights[f:] > 0).sum() >= n - 2 * f


def test_filter_of_equal_rows_and_without_bad_ones_is_the_mean():
    for frame in (np.zeros((5, 5)), np.full((5, 5), 1e9), geometry_of(SEVEN[:5]).frame[:5, :5]):
        np.testing.assert_array_equal(filter_weights(frame, 0), np.full(5, 0.2))
    np.testing.assert_array_equal(filter_weights(np.zeros((5, 5)), 2), np.full(5, 0.2))
    np.testing.assert_allclose(filter_weights(np.full((5, 5), 1e9), 2), 0.2)


def test_a_filter_held_up_by_a_removed_row_is_given_up(monkeypatch):
    monkeypatch.setattr(spread, "MOST_STEPS", 300)
    x = np.vstack([TABLE[:5], 1e4 * TABLE[5:]])
    with pytest.raises(InvalidInputError, match="300 steps"):
        filter_weights(geometry_of(x).frame[:6, :6], 1, removed_count=True)
    assert filter_weights(geometry_of(x).frame[:6, :6], 1)[5] == 0


def test_eigenvector_of_a_known_eigenvalue(rng):
    for n in (1, 2, 9, 40):
        a = rng.standard_normal((n, n))
        a = a @ a.T
        values, vectors = np.linalg.eigh(a)
        got = spread._eigenvector(a, float(values[-1]))
        np.testing.assert_allclose(np.abs(got @ vectors[:, -1]), 1, rtol=1e-9)


# ---- subspaces ---------------------------------------------------------------------------------


def flag_on_rows(g, r, steps, pairwise, y):
    """The flag median by singular value decompositions of the weighted columns."""
    x = (g / np.linalg.norm(g, axis=1)[:, None]).T
    p = x.shape[1]
    share = pairwise / (p * (p - 1))

    def objective(y):
        total = np.sqrt(np.abs(1 - ((y.T @ x) ** 2).sum(axis=0))).sum()
        for i, j in itertools.permutations(range(p), 2):
            ratio = ((y.T @ (x[:, i] - x[:, j])) ** 2).sum()
            total += share * np.sqrt(abs(1 - ratio))
        return total

    objectives = [objective(y)]
    for _ in range(steps):
        ratio = ((y.T @ x) ** 2).sum(axis=0)
        columns = [x * (np.abs(1 - ratio) + FLOOR) ** -0.25]
        if pairwise:
            for i, j in itertools.permutations(range(p), 2):
                z = x[:, i] - x[:, j]
                w = (abs(1 - ((y.T @ z) ** 2).sum()) + FLOOR) ** -0.25 * share
                columns.append(w * z[:, None])
        y = np.linalg.svd(np.hstack(columns), full_matrices=False)[0][:, :r]
        objectives.append(objective(y))
    return (y @ (y.T @ x)).sum(axis=1) / r, objectives


@pytest.mark.parametrize("pairwise", [0.0, 2.0])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("given", [False, True])
def test_flag_median_equals_its_form_with_singular_vectors(pairwise, steps, given, rng):
    g = rng.standard_normal((7, 60)) + 1
    y = np.zeros((60, 4))
    if given:
        y = np.linalg.qr(rng.uniform(-0.5, 0.5, (60, 60)))[0][:, :4]
    unit, lengths = unit_products(g @ g.T)
    start = (g / np.linalg.norm(g, axis=1)[:, None]) @ y if given else None
    a, ratios, objectives = flag_coefficients(unit, 4, steps, pairwise, start)
    want, values = flag_on_rows(g, 4, steps, pairwise, y)
    np.testing.assert_allclose((a / lengths) @ g, want, atol=1e-12)
    np.testing.assert_allclose(objectives, values, rtol=1e-9)  # roots of differences near zero
    if pairwise == 0:
        assert (np.diff(objectives) <= 0).all()
    assert ((ratios >= 0) & (ratios <= 1)).all()


def test_flag_median_by_hand():
    same = np.tile([3.0, 4.0, 0.0], (5, 1))
    unit, lengths = unit_products(same @ same.T)
    a, ratios, _ = flag_coefficients(unit, 1, 1)
    np.testing.assert_allclose((a / lengths) @ same, 5 * np.array([0.6, 0.8, 0]), rtol=1e-12)
    np.testing.assert_allclose(ratios, 1, rtol=1e-12)
    assert abs(FLOOR**-0.25 - 56.2341325) < 1e-7  # the largest weight


def test_flag_median_of_full_rank_is_the_sum_of_unit_rows(rng):
    g = rng.standard_normal((5, 30))
    unit, _ = unit_products(g @ g.T)
    for r in (5, 7):
        np.testing.assert_allclose(flag_coefficients(unit, r, 3)[0], 1 / r, rtol=1e-9)
    flat = rng.standard_normal((6, 2)) @ rng.standard_normal((2, 30))  # rank 2
    unit, lengths = unit_products(flat @ flat.T)
    a, _, _ = flag_coefficients(unit, 3, 4)
    want = (flat / lengths[:, None]).sum(axis=0) / 3
    np.testing.assert_allclose((a / lengths) @ flat, want, rtol=1e-6)


def test_zero_rows_have_no_direction_and_no_weight(rng):
    g = rng.standard_normal((6, 20)) + 1
    unit, _ = unit_products(g @ g.T)
    padded = np.vstack([g[:2], np.zeros((1, 20)), g[2:]])
    more, lengths = unit_products(padded @ padded.T)
    assert lengths[2] == 0 and (more[2] == 0).all()
    for pairwise in (0.0, 1.0):
        want = flag_coefficients(unit, 2, 3, pairwise)[0]
        got = flag_coefficients(more, 2, 3, pairwise)[0]
        np.testing.assert_allclose(np.delete(got, 2), want, rtol=1e-9, atol=1e-12)
    assert (flag_coefficients(np.zeros((3, 3)), 2, 2)[0] == 0).all()


def principal_on_rows(g: np.ndarray, keep: float) -> np.ndarray:
    """The procedure with every projection carried out."""
    m = len(g)
    values, vectors = np.linalg.eigh(g @ g.T / m)
    values, vectors = values[::-1], vectors[:, ::-1]
    total = np.zeros_like(g)
    for j in range(int(m * keep)):
        v = g.T @ vectors[:, j]
        for i in range(m):
            projected = (g[i] @ v) / (v @ v) * v
            length = np.linalg.norm(g[i]) * values[j] / values.sum()
            total[i] += length * projected / np.linalg.norm(projected)
    return total.mean(axis=0)


def test_principal_coefficients_by_hand():
    g = np.array([[1, 0, 0.5], [0.2, 1, 0], [1, 0.8, 1]])
    alpha = principal_coefficients(g @ g.T, 0.8)
    np.testing.assert_allclose(alpha, [0.18707981, 0.24136577, 0.41233900], atol=5e-9)
    np.testing.assert_allclose(alpha @ g, [0.64769196, 0.57123696, 0.50587890], atol=5e-9)
    same = np.tile([3.0, 4.0], (2, 1))
    np.testing.assert_allclose(principal_coefficients(same @ same.T, 0.8) @ same, [3, 4])


@pytest.mark.parametrize(("m", "d", "keep"), [(5, 40, 0.8), (8, 300, 0.5), (3, 7, 1.0)])
def test_principal_coefficients_equal_the_literal_procedure(m, d, keep, rng):
    g = rng.standard_normal((m, d)) + 0.3
    alpha = principal_coefficients(g @ g.T, keep)
    np.testing.assert_allclose(alpha @ g, principal_on_rows(g, keep), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(principal_coefficients(9 * g @ g.T, keep), alpha, rtol=1e-9)
    values = np.linalg.eigvalsh(g @ g.T)[::-1]
    part = values[: int(m * keep)] / values.sum()
    bound = np.linalg.norm(g, axis=1).mean() * np.sqrt((part**2).sum())
    assert np.linalg.norm(alpha @ g) <= bound * (1 + 1e-12)


def test_directions_without_variance_are_left_out():
    g = np.array([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [2, 0, 1], [0, 1, 1]])
    alpha = principal_coefficients(g @ g.T, 0.8)
    assert np.isfinite(alpha).all() and np.linalg.norm(alpha @ g) < 2
    np.testing.assert_array_equal(principal_coefficients(np.zeros((4, 4)), 0.8), 0.25)
    np.testing.assert_array_equal(principal_coefficients(np.ones((1, 1)), 0.8), 1.0)


def test_an_entry_that_is_zero_has_no_sign():
    lengths = np.array([2, 1, 0.5])
    g = lengths[:, None] * np.linalg.qr(np.random.default_rng(1).standard_normal((9, 3)))[0].T
    products = g @ g.T
    assert (products[~np.eye(3, dtype=bool)] != 0).any()  # rounding, which must not give a sign
    want = lengths**2 / (lengths**2).sum() / 3  # each direction has the sign of its own row only
    np.testing.assert_allclose(principal_coefficients(products, 1.0), want, rtol=1e-12)
