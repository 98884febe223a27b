"""Geometry: distances of mixed rows without the rows, far rows, canonical order."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation._geometry import Geometry, LayerProducts, sandwich


def squares_of(x: np.ndarray) -> np.ndarray:
    """Squared distances from differences, in extended precision."""
    wide = x.astype(np.longdouble)
    return ((wide[:, None] - wide[None, :]) ** 2).sum(axis=2).astype(np.float64)


def geometry_of(x: np.ndarray, **more) -> Geometry:
    norms = (x.astype(np.longdouble) ** 2).sum(axis=1).astype(np.float64)
    return Geometry.of(squares_of(x), norms, **more)


def test_four_points_by_hand():
    g = geometry_of(np.array([[3.0, 4.0], [0.0, 0.0], [3.0, 0.0], [4.0, 0.0]]))
    assert g.n == 4 and list(g.norms) == [25, 0, 9, 16]
    np.testing.assert_array_equal(
        g.distances, [[0, 25, 16, 17], [25, 0, 9, 16], [16, 9, 0, 1], [17, 16, 1, 0]]
    )
    # row 2 is in the midst: products about (3, 0), the origin last
    about = np.array([[0, 4], [-3, 0], [0, 0], [1, 0], [-3, 0]])
    np.testing.assert_array_equal(g.frame, about @ about.T)
    assert list(g.midst) == [1, 2, 3]


def matrices(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    neighbours = np.zeros((n, n))
    for i in range(n):
        neighbours[i, [i, *((i + np.arange(1, n - 2)) % n)]] = 1 / (n - 2)
    buckets = np.kron(np.eye(n // 2), np.full((1, 2), 0.5))
    return {
        "neighbours": neighbours,
        "buckets": buckets,
        "clipping": np.diag(np.where(np.arange(n) % 3 == 0, rng.uniform(0.2, 1.0, n), 1.0)),
        "both": buckets @ np.diag(rng.uniform(0.2, 1.0, n)),
        "any": rng.standard_normal((4, n)),
    }


@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("kind", ["neighbours", "buckets", "clipping", "both", "any"])
def test_mixed_rows_have_the_distances_of_materialised_rows(kind, offset, rng):
    x = offset + 1e-2 * rng.standard_normal((8, 200))
    matrix = matrices(8, rng)[kind]
    got, want = geometry_of(x).mixed(matrix), geometry_of(matrix @ x)
    # rounding of the frame: relative to the distances the weights span
    weights = np.column_stack([matrix, 1 - matrix.sum(axis=1)])
    span = np.abs(weights) @ np.append(geometry_of(x).frame.diagonal()[:-1], 0)
    if not np.allclose(matrix.sum(axis=1), 1):
        span = span + (np.abs(weights).sum(axis=1) ** 2) * geometry_of(x).norms.max()
    tolerance = 1e-13 * (span[:, None] + span[None, :])
    assert (np.abs(got.distances - want.distances) <= tolerance).all()
    np.testing.assert_allclose(got.norms, want.norms, rtol=1e-12)
    assert (np.diagonal(got.distances) == 0).all()


def test_inner_products_and_layers_are_mixed_too(rng):
    x = rng.standard_normal((6, 30))
    parts = np.stack([x[:, :10] @ x[:, :10].T, x[:, 10:] @ x[:, 10:].T])
    layers = LayerProducts(parts, ("a", "b"), (10, 20), ("a", "b"))
    matrix = rng.standard_normal((3, 6))
    got = geometry_of(x, inner=x @ x.T, layers=layers).mixed(matrix, renames=True)
    y = matrix @ x
    np.testing.assert_allclose(got.products, y @ y.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got.layers.products[1], y[:, 10:] @ y[:, 10:].T, atol=1e-12)
    assert list(got.index) == [0, 1, 2]


def test_rows_that_stay_keep_their_distances_bit_for_bit(rng):
    g = geometry_of(5 + rng.standard_normal((5, 9)))
    assert g.mixed(np.eye(5)).squares.tobytes() == g.squares.tobytes()
    clipped = g.mixed(np.diag([1.0, 0.5, 1.0, 1.0, 0.1]))
    kept = np.ix_([0, 2, 3, 5], [0, 2, 3, 5])
    assert clipped.squares[kept].tobytes() == g.squares[kept].tobytes()


def test_equal_mixed_rows_are_at_distance_zero(rng):
    g = geometry_of(1e3 + rng.standard_normal((7, 40)))
    row = np.array([0, 1 / 3, 0, 1 / 3, 0, 0, 1 / 3])
    mixed = g.mixed(np.stack([row, np.eye(7)[0], row, row]), renames=True)
    assert (mixed.distances[np.ix_([0, 2, 3], [0, 2, 3])] == 0).all()
    assert mixed.distances[0].tobytes() == mixed.distances[2].tobytes()


def test_norms_alone_can_be_clipped():
    g = Geometry.of(None, np.array([25.0, 4.0]))
    got = g.mixed(np.diag([0.4, 1.0]))
    np.testing.assert_allclose(got.norms, [4.0, 4.0], rtol=1e-15)
    assert np.isnan(got.distances[0, 1])


# ---- far rows ----------------------------------------------------------------------------------


def coarse(x: np.ndarray, accuracy: float, with_inner: bool) -> Geometry:
    """Geometry as float32 kernels give it: distances and products with relative errors."""
    rng = np.random.default_rng(5)
    n = len(x)
    error = np.triu(1 + accuracy * rng.uniform(-1, 1, (n, n)), 1)
    error = error + error.T + np.eye(n)
    norms = (x**2).sum(axis=1) * (1 + accuracy * rng.uniform(-1, 1, n))
    lengths = np.sqrt(norms)
    products = x @ x.T + (error - 1) * lengths[:, None] * lengths[None, :]
    np.fill_diagonal(products, norms)
    inner = products if with_inner else None
    return Geometry.of(squares_of(x) * error, norms, inner, accuracy=accuracy)


@pytest.mark.parametrize("far", [1e5, 1e9, 1e15, 1e30])
def test_far_rows_are_placed_by_inner_products(far, rng):
    x = rng.standard_normal((9, 60))
    x[[2, 6]] *= far
    accuracy = 2.0**-24
    plain = coarse(x, accuracy, False)
    assert list(np.flatnonzero(plain.far)) == [2, 6]
    g = coarse(x, accuracy, True)
    weights = np.append(np.where(plain.far, 1 / far, 1.0) / 9, 0.0)
    weights[-1] = 1 - weights.sum()
    z = weights[:-1] @ x
    want = ((x - z) ** 2).sum(axis=1)[~plain.far]

    def distances(geometry: Geometry) -> np.ndarray:
        toward = geometry.frame @ weights
        found = np.diagonal(geometry.frame) - 2 * toward + weights @ toward
        return found[:-1][~plain.far]

    np.testing.assert_allclose(distances(g), want, rtol=1e-4)
    if far >= 1e9:  # what distances alone would say
        assert np.abs(distances(plain) / want - 1).max() > 1e-2


def test_clipped_far_rows_have_the_right_distances(rng):
    x = rng.standard_normal((7, 50))
    x[3] *= 1e20
    scale = np.minimum(1, 2 / np.linalg.norm(x, axis=1))
    got = coarse(x, 2.0**-24, True).mixed(np.diag(scale))
    np.testing.assert_allclose(got.distances, squares_of(scale[:, None] * x), rtol=1e-5)


def test_ordinary_rows_are_not_far(rng):
    for x in (rng.standard_normal((6, 50)), np.ones((4, 3)), np.ones((1, 3)), np.zeros((2, 3))):
        assert not coarse(x, 2.0**-24, False).far.any()


# ---- order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal_norms", [False, True])
def test_canonical_order_does_not_depend_on_the_order_of_the_call(equal_norms, rng):
    x = rng.standard_normal((7, 12))
    if equal_norms:  # a signed permutation keeps the norm, bit for bit
        x = np.sort(np.abs(x[0]))[rng.permuted(np.tile(np.arange(12), (7, 1)), axis=1)]
        x *= rng.choice([-1.0, 1.0], x.shape)
        x = np.round(x * 1024) / 1024
    x = np.vstack([x, x[2]])  # and one row twice
    weights = np.arange(1.0, 9.0)
    g = geometry_of(x)
    assert (len(np.unique(g.norms)) == 1) == equal_norms
    first = None
    for _ in range(20):
        p = rng.permutation(8)
        q = p[geometry_of(x[p]).canonical(weights[p])]
        first = q if first is None else first
        assert x[q].tobytes() == x[first].tobytes()
        assert (weights[q] == weights[first]).all()


def test_order_and_take():
    g = geometry_of(np.array([[1.0], [2.0], [4.0], [8.0]])).renamed(np.array([5, 3, 4, 0]))
    assert list(g.order(np.array([1.0, 0.0, 0.0, 1.0]))) == [1, 2, 3, 0]
    part = g.take(np.array([3, 1]))
    assert list(part.index) == [0, 3] and list(part.norms) == [64, 4]
    np.testing.assert_array_equal(part.distances, [[0, 36], [36, 0]])


def test_sandwich_is_symmetric(rng):
    form = rng.standard_normal((5, 5))
    weights = rng.standard_normal((3, 5))
    got = sandwich(weights, form + form.T)
    assert (got == got.T).all()
    np.testing.assert_allclose(got, weights @ (form + form.T) @ weights.T, rtol=1e-12, atol=1e-13)
