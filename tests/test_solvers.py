"""The n x n problems behind the rules: worked numbers, and brute force on the rows themselves."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from flcore.aggregation._geometry import Geometry
from flcore.aggregation._solvers import diameter
from flcore.aggregation._solvers.centres import clip_about_centre, distances_to, weiszfeld
from flcore.aggregation._solvers.diameter import smallest_diameter
from flcore.aggregation._solvers.neighbours import krum_scores, nearest, repeated_krum
from flcore.errors import InvalidInputError
from tables import SEVEN, STEPS, TABLE


def squares_of(x: np.ndarray) -> np.ndarray:
    return ((x[:, None] - x[None, :]) ** 2).sum(axis=2)


def geometry_of(x: np.ndarray) -> Geometry:
    return Geometry.of(squares_of(x), (x**2).sum(axis=1))


# ---- nearest rows ------------------------------------------------------------------------------


def test_krum_scores_by_hand():
    d = squares_of(TABLE)
    paper = [0.2, 0.4, 0.26, 0.28, 0.58, 999.61]
    np.testing.assert_allclose(krum_scores(d, 3), paper, rtol=1e-12)
    byzfl = [0.09, 0.225, 0.13, 0.165, 0.27, 336.55]
    np.testing.assert_allclose(krum_scores(d, 4) / 4, byzfl, rtol=1e-12)


def test_repeated_krum_by_hand():
    d = squares_of(SEVEN)
    assert list(repeated_krum(d, np.arange(7), 1, 5)) == [5, 4, 0, 1, 2]
    scores = krum_scores(d, 4)
    assert list(np.lexsort((np.arange(7), scores))[:5]) == [5, 4, 2, 0, 3]


@pytest.mark.parametrize("trial", range(20))
def test_repeated_krum_runs_krum_on_what_is_left(trial):
    rng = np.random.default_rng(trial)
    n, f = 11 + trial % 3, 2
    d = squares_of(rng.standard_normal((n, 3)))
    left, want = list(range(n)), []
    for _ in range(n - 2 * f):
        q = max(1, len(left) - f - 2)
        scores = [sum(sorted(d[i, j] for j in left if j != i)[:q]) for i in left]
        want.append(left.pop(int(np.argmin(scores))))
    assert list(repeated_krum(d, np.arange(n), f, n - 2 * f)) == want


def test_ties_go_to_the_lowest_position_in_the_call():
    d = squares_of(STEPS)
    assert list(nearest(d, np.arange(3), 2)[1]) == [1, 0]
    assert list(nearest(d, np.array([2, 1, 0]), 2)[1]) == [1, 2]
    same = np.zeros((4, 4))
    assert list(nearest(same, np.array([3, 0, 2, 1]), 2)[0]) == [0, 1]
    assert list(repeated_krum(same, np.array([3, 0, 2, 1]), 0, 4)) == [1, 3, 2, 0]


# ---- centres -----------------------------------------------------------------------------------


def weiszfeld_on_rows(x, weights, z, nu, steps):
    for _ in range(steps):
        b = weights / np.maximum(nu, np.linalg.norm(x - z, axis=1))
        z = (b / b.sum()) @ x
    return z


def at_origin(n: int) -> np.ndarray:
    return np.append(np.zeros(n), 1.0)


@pytest.mark.parametrize("start", ["zero", "mean"])
def test_weiszfeld_on_the_distances_equals_weiszfeld_on_the_rows(start, rng):
    x = rng.standard_normal((7, 50))
    g, a = geometry_of(x), rng.uniform(0.5, 2, 7)
    a /= a.sum()
    first = at_origin(7) if start == "zero" else np.append(a, 0.0)
    for nu, steps in ((0.1, 3), (1e-5, 4), (1e-6, 60)):
        c, away, _ = weiszfeld(g.frame, a, first, nu, steps)
        want = weiszfeld_on_rows(x, a, first[:-1] @ x, nu, steps)
        np.testing.assert_allclose(c @ x, want, rtol=1e-12, atol=1e-12 * np.abs(want).max())
        np.testing.assert_allclose(away, np.linalg.norm(x - want, axis=1), rtol=1e-12)
        assert abs(c.sum() - 1) < 1e-14


def test_weiszfeld_by_hand():
    for x, nu, steps, want in (
        (STEPS, 0.1, 3, [3.787887641179713, 4.787887641179712, 5.787887641179712]),
        (TABLE, 0.1, 3, [1.0902860686, 1.9053968862, -0.9728370839, 0.4119433217]),
        (TABLE, 1e-6, 50, [1.0042280732, 1.9949802901, -1.0011979287, 0.4956532577]),
    ):
        n = len(x)
        c, _, _ = weiszfeld(geometry_of(x).frame, np.full(n, 1 / n), at_origin(n), nu, steps)
        np.testing.assert_allclose(c @ x, want, rtol=3e-10)


def test_weiszfeld_finds_the_median_of_numbers(rng):
    x = rng.standard_normal((9, 1))
    c, _, _ = weiszfeld(geometry_of(x).frame, np.full(9, 1 / 9), at_origin(9), 1e-9, 2000)
    np.testing.assert_allclose(c @ x, np.median(x), atol=1e-6)


def test_weiszfeld_objective_never_increases_and_the_tolerance_stops_it(rng):
    x = rng.standard_normal((12, 30))
    g, a = geometry_of(x), np.full(12, 1 / 12)
    _, away, objectives = weiszfeld(g.frame, a, at_origin(12), 1e-9, 40)
    assert len(objectives) == 41 and (np.diff(objectives) <= 1e-14).all()
    np.testing.assert_allclose(objectives[-1], (a * away).sum(), rtol=1e-15)
    _, _, short = weiszfeld(g.frame, a, at_origin(12), 1e-9, 40, tolerance=1e-6)
    assert 3 < len(short) < 41 and short == objectives[: len(short)]
    assert abs(short[-2] - short[-1]) <= 1e-6 * short[-1] < abs(short[-3] - short[-2])


def test_a_row_far_out_stops_the_objective_and_not_the_movement():
    x = np.array([[0, 0], [0, 2], [2, 0], [2, 2], [1e7, 1e7]])
    g, a = geometry_of(x), np.full(5, 0.2)
    mean = np.append(a, 0.0)
    c, _, _ = weiszfeld(g.frame, a, mean, 1e-9, 500, tolerance=1e-10, movement=True)
    best = 1 + 1 / np.sqrt(3)  # four corners of a square and a unit pull along the diagonal
    np.testing.assert_allclose(c @ x, best, rtol=1e-6)
    c, _, _ = weiszfeld(g.frame, a, mean, 1e-9, 500, tolerance=1e-10)
    assert np.abs(c @ x - best).max() > 1e-4


def test_equal_rows_are_their_own_centre_after_one_step():
    frame = geometry_of(np.tile([3.0, 4.0], (5, 1))).frame
    c, away, objectives = weiszfeld(frame, np.full(5, 0.2), at_origin(5), 0.0, 10, 1e-12)
    np.testing.assert_allclose(c, 0.2, rtol=1e-15)
    assert (away == 0).all() and len(objectives) == 3


def clipping_on_rows(x, weights, v, radius, steps):
    for _ in range(steps):
        lengths = np.linalg.norm(x - v, axis=1)
        with np.errstate(divide="ignore"):
            v = v + (weights * np.minimum(1, radius / lengths)) @ (x - v)
    return v


@pytest.mark.parametrize("radius", [0.0, 0.5, 3.0, 1e9, np.inf])
def test_clipping_on_the_distances_equals_clipping_on_the_rows(radius, rng):
    x = 2 + rng.standard_normal((8, 40))
    weights = rng.uniform(0.5, 2, 8)
    weights /= weights.sum()
    g = geometry_of(x)
    before = np.zeros(40)
    for steps in (1, 2, 3, 5):
        c, _ = clip_about_centre(g.frame, weights, radius, steps, np.sqrt(g.norms))
        want = clipping_on_rows(x, weights, np.zeros(40), radius, steps)
        np.testing.assert_allclose(c @ x, want, rtol=1e-12, atol=1e-14)
        if steps <= 3:  # the centre moves by the radius at most
            assert np.linalg.norm(c @ x - before) <= radius * (1 + 1e-12)
            before = c @ x


def test_clipping_by_hand():
    g = geometry_of(TABLE)
    c, _ = clip_about_centre(g.frame, np.full(6, 1 / 6), 1.0, 3, np.sqrt(g.norms))
    want = [1.0487776054, 1.6905379168, -0.8340756831, 0.3529082630]
    np.testing.assert_allclose(c @ TABLE, want, rtol=3e-10)


def test_distances_to_a_combination(rng):
    x = rng.standard_normal((5, 9))
    w = rng.standard_normal(6)
    w[-1] = 1 - w[:-1].sum()
    want = np.linalg.norm(x - w[:-1] @ x, axis=1)
    np.testing.assert_allclose(distances_to(geometry_of(x).frame, w), want, rtol=1e-12)


# ---- smallest diameter -------------------------------------------------------------------------


def enumerated(d: np.ndarray, keep: int) -> tuple[int, ...]:
    """First subset in lexicographic order with the smallest largest distance."""
    return min(
        itertools.combinations(range(len(d)), keep), key=lambda s: d[np.ix_(s, s)].max()
    )  # min takes the first of equal ones


@pytest.mark.parametrize(("n", "f"), [(8, 1), (8, 3), (11, 2), (11, 5), (13, 4), (13, 6)])
@pytest.mark.parametrize("kind", ["normal", "grid", "clusters"])
def test_smallest_diameter_equals_enumeration(n, f, kind):
    for trial in range(4):
        rng = np.random.default_rng([n, f, trial])
        x = rng.standard_normal((n, 3))
        if kind == "grid":  # many ties
            x = rng.integers(0, 3, (n, 2)).astype(float)
        if kind == "clusters":
            x[: n // 3] += 5
        d = squares_of(x)
        assert tuple(smallest_diameter(d, n - f)) == enumerated(d, n - f)


def test_smallest_diameter_of_many_rows_is_fast():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((100, 200))
    x[rng.permutation(100)[:45]] += 20 * rng.standard_normal((45, 200))
    d = squares_of(x)
    start = time.perf_counter()
    rows = smallest_diameter(d, 55)
    assert time.perf_counter() - start < 2  # 1e28 subsets
    assert len(rows) == 55 and (np.linalg.norm(x[rows], axis=1) < 30).all()


def test_rounding_does_not_choose_among_subsets():
    """Three of four corners of a square, whose diagonals differ in the last bit."""
    d = squares_of(np.array([[0.0, 0], [0, 1], [1, 1], [1, 0]]))
    for i, j in ((0, 2), (1, 3)):
        near = d.copy()
        near[i, j] = near[j, i] = np.nextafter(2, 0)
        assert list(smallest_diameter(near, 3)) == [0, 1, 2]


def test_smallest_diameter_edges():
    assert list(smallest_diameter(np.zeros((1, 1)), 1)) == [0]
    assert list(smallest_diameter(np.zeros((5, 5)), 3)) == [0, 1, 2]
    assert list(smallest_diameter(squares_of(TABLE), 6)) == [0, 1, 2, 3, 4, 5]
    assert list(smallest_diameter(squares_of(TABLE), 1)) == [0]


def test_a_search_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(diameter, "MOST_BRANCHES", 2)
    rng = np.random.default_rng(0)
    with pytest.raises(InvalidInputError, match="given up"):
        smallest_diameter(squares_of(rng.standard_normal((60, 200))), 33)
