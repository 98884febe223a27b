"""StableMax along a dimension: worked numbers, variants against the reference, layouts, limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flcore
from flcore import _native, _variants
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops import log_stablemax, log_stablemax_backward, stablemax, stablemax_backward
from flcore.ops._stablemax_call import STEPS
from support import DTYPES, EPS, np_dtype, outputs_per_level, unaligned

VARIANTS = [v for v, why in _variants.available("stablemax", "cpu").items() if not why]
FORWARD = (stablemax, log_stablemax)
BACKWARD = {stablemax: stablemax_backward, log_stablemax: log_stablemax_backward}
X = np.array([2.0, 0.0, -1.0, -3.0])
P = np.array([0.631578947368, 0.210526315789, 0.105263157895, 0.052631578947])
SHAPES = [
    *(((3, n), 1) for n in (1, 2, 7, 15, 16, 17, 33, 1023, 1024, 1025, 5000)),
    *(((n, 5), 0) for n in (1, 3, 31, 32, 33, 70)),
    *(((2, 9, n), 1) for n in (1, 2, 15, 16, 17, 255, 256, 257, 600)),
    *(((11,), 0), ((2, 3, 4, 5), 2), ((2, 3, 4, 5), 0), ((2, 3, 4, 5), -1), ((0, 3), 1)),
    *(((3, 0), 1), ((0, 3), 0), ((3, 0), 0)),
]


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 3.0):
    return (scale * rng.standard_normal(shape)).astype(np_dtype(dtype))


def sum_without(s: np.ndarray) -> np.ndarray:
    """Sum of all entries of a row but one, for each."""
    rest = np.zeros_like(s)
    for k in range(s.shape[-1]):
        rest[..., k] = np.delete(s, k, -1).sum(-1)
    return rest


def exact(f, x: np.ndarray, dim: int, v: np.ndarray | None = None):
    """The definition in extended precision, and the size of its terms: errors are parts of it."""
    x = np.moveaxis(x.astype(np.longdouble), dim, -1)
    a = 1 + np.abs(x)
    s = np.where(x >= 0, a, 1 / a)
    p = s / s.sum(-1, keepdims=True)
    g = np.sign(x) * np.log1p(np.abs(x))
    if v is None:
        y = p
        if f is log_stablemax:
            rest = s.sum(-1, keepdims=True) - s
            if x.shape[-1] <= 100:  # with more no entry takes all
                rest = sum_without(s)
            y = np.where(rest < s, -np.log1p(rest / s), g - np.log(rest + s))
        return np.moveaxis(y, -1, dim), np.moveaxis(np.abs(y), -1, dim)
    v = np.moveaxis(v.astype(np.longdouble), dim, -1)
    if f is stablemax:
        y = p * (v - (v * p).sum(-1, keepdims=True)) / a
        terms = p * (np.abs(v) + (np.abs(v) * p).sum(-1, keepdims=True)) / a
    else:
        y = (v - p * v.sum(-1, keepdims=True)) / a
        terms = (np.abs(v) + p * np.abs(v).sum(-1, keepdims=True)) / a
    return np.moveaxis(y, -1, dim), np.moveaxis(terms, -1, dim)


def close(got: np.ndarray, want, terms, dtype: str) -> None:
    """Rounded once to the dtype, with a few roundings of the compute type before."""
    compute = "float64" if dtype == "float64" else "float32"
    least = {"float16": 6e-8, "bfloat16": 1e-38, "float32": 1e-38}.get(dtype, 1e-300)
    half = 0 if dtype == compute else EPS[dtype] / 2
    bound = half * np.abs(want) + 5 * EPS[compute] * terms + least
    assert got.dtype == np_dtype(dtype) and got.shape == want.shape
    assert (np.abs(got.astype(np.longdouble) - want) <= bound).all()


# ---- by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_worked_numbers(variant):
    np.testing.assert_allclose(stablemax(X, variant=variant), P, rtol=1e-11)
    logs = log_stablemax(X, variant=variant)
    np.testing.assert_allclose(-logs[[0, 3]], [0.45953232937844, 2.94443897916644], rtol=1e-14)
    grad = log_stablemax_backward(np.array([-1.0, 0, 0, 0]), X, variant=variant)
    want = [-0.122807017544, 0.210526315789, 0.052631578947, 0.013157894737]
    np.testing.assert_allclose(grad, want, rtol=1e-10)
    grad = log_stablemax_backward(np.array([0, 0, 0, -1.0]), X, variant=variant)
    want = [0.210526315789, 0.210526315789, 0.052631578947, -0.236842105263]
    np.testing.assert_allclose(grad, want, rtol=1e-10)
    # p_0 = 12/19: dp_0/dx = p_0 ((1, 0, 0, 0) - p) r
    grad = stablemax_backward(np.array([1.0, 0, 0, 0]), X, variant=variant)
    want = 12 / 19 * np.array([7 / 19 / 3, -4 / 19, -2 / 19 / 2, -1 / 19 / 4])
    np.testing.assert_allclose(grad, want, rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_class_takes_all(variant, dtype):
    x = np.array([1e4, 0, -1e4], dtype)
    logs = log_stablemax(x, variant=variant)
    np.testing.assert_allclose(-logs[[0, 2]], [9.99949993336083e-5, 18.4209807289524], rtol=3e-7)
    for dim_first in (False, True):  # a lane a row too
        array = np.stack([x, x], 1) if dim_first else x
        v = np.zeros_like(array)
        v[0] = -1
        grad = log_stablemax_backward(v, array, 0, variant=variant)
        np.testing.assert_allclose(grad[0], -9.99800020001e-9, rtol=3e-7)


def test_names_and_codes():
    assert list(_native.core.STABLEMAX_STEPS) == list(range(len(STEPS)))
    assert STEPS == (*(f.__name__ for f in FORWARD), *(BACKWARD[f].__name__ for f in FORWARD))


# ---- against the definition ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "triton"])
def test_every_layout_and_size(variant, dtype, rng):
    for shape, dim in SHAPES:
        for scale in (3.0, 1e3):
            x, v = draw(rng, shape, dtype, scale), draw(rng, shape, dtype)
            for f in FORWARD:
                got = f(x, dim, variant=variant)
                close(got, *exact(f, x, dim), dtype)
                got = BACKWARD[f](v, x, dim, variant=variant)
                close(got, *exact(f, x, dim, v), dtype)


@pytest.mark.skipif("triton" not in VARIANTS, reason="triton is not installed")
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_in_one_visit_and_in_two(dtype, rng):
    shapes = (((3, 70), 1), ((2, 40, 33), 1), ((5, 4, 3), 0), ((2, 17_000), 1), ((17_000, 3), 0))
    for shape, dim in shapes:
        x, v = draw(rng, shape, dtype), draw(rng, shape, dtype)
        for f in FORWARD:
            close(f(x, dim, variant="triton"), *exact(f, x, dim), dtype)
            got = BACKWARD[f](v, x, dim, variant="triton")
            close(got, *exact(f, x, dim, v), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_rows(dtype, rng):
    for shape, dim in (((1, 262_144), 1), ((20_000, 5), 0)):
        x, v = draw(rng, shape, dtype), draw(rng, shape, dtype)
        for f in FORWARD:
            close(f(x, dim), *exact(f, x, dim), dtype)
            close(BACKWARD[f](v, x, dim), *exact(f, x, dim, v), dtype)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e7, 1e15])
@pytest.mark.parametrize("classes", [2, 12, 113, 3000])
def test_small_results_keep_their_digits(classes, size, rng):
    """log p, 1 - p and gradients of the class that takes all, in float32."""
    x = (-size / 2 * (1 + 0.1 * rng.random((4, classes)))).astype(np.float32)
    x[:, 1] = size
    wider = x.astype(np.longdouble)
    a = 1 + np.abs(wider)
    s = np.where(x >= 0, a, 1 / a)
    rest = np.delete(s, 1, 1).sum(1)
    want = -np.log1p(rest / s[:, 1])
    for dim, array in ((1, x), (0, np.ascontiguousarray(x.T))):
        got = np.moveaxis(log_stablemax(array, dim), dim, 1)[:, 1]
        np.testing.assert_allclose(got.astype(np.longdouble), want, rtol=5e-7)
        v = np.zeros_like(array)
        np.moveaxis(v, dim, 1)[:, 1] = 1
        got = np.moveaxis(log_stablemax_backward(v, array, dim), dim, 1)[:, 1]
        slope = rest / (rest + s[:, 1]) / a[:, 1]
        np.testing.assert_allclose(got.astype(np.longdouble), slope, rtol=1e-6, atol=1e-44)
        got = np.moveaxis(stablemax_backward(v, array, dim), dim, 1)[:, 1]
        slope = slope * s[:, 1] / (rest + s[:, 1])
        np.testing.assert_allclose(got.astype(np.longdouble), slope, rtol=1e-6, atol=1e-44)


# ---- what must hold ------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 12, 400]), st.sampled_from([1.0, 1e5]))
def test_laws(seed, size, scale):
    rng = np.random.default_rng(seed)
    x = draw(rng, (size,), "float64", scale)
    p = stablemax(x)
    g = np.sign(x) * np.log1p(np.abs(x))
    e = np.exp(g - g.max())
    np.testing.assert_allclose(p, e / e.sum(), rtol=1e-13)  # StableMax(x) = softmax(g)
    assert np.isclose(p.sum(), 1, rtol=1e-14) and p.argmax() == x.argmax()
    np.testing.assert_allclose(np.exp(log_stablemax(x)), p, rtol=1e-13)
    order = rng.permutation(size)
    np.testing.assert_allclose(stablemax(x[order]), p[order], rtol=1e-14)
    v = rng.standard_normal(size)
    # p does not change along v = 1, and log p is not moved by (1 + |x|) dx = const of its softmax
    atol = 1e-15 * size
    np.testing.assert_allclose(stablemax_backward(np.full(size, 7.0), x), 0, atol=atol)
    for f in FORWARD:
        grad = BACKWARD[f](v, x)
        assert abs(np.sum((1 + np.abs(x)) * grad)) <= 1e-14 * np.abs(v).sum()
        np.testing.assert_array_equal(BACKWARD[f](-v, x), -grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_and_what_is_not_finite(variant, dtype, rng):
    masked = draw(rng, (6, 40), dtype)
    masked[:, 3::5] = -np.inf
    masked[1, 4] = 1.0
    bad = draw(rng, (5, 40), dtype)
    bad[0, 7], bad[1, 7], bad[2] = np.inf, np.nan, -np.inf
    bad[3, 5:7] = np.inf
    x = np.concatenate([masked, bad])
    v = draw(rng, x.shape, dtype)
    kept = masked[:, masked[0] > -np.inf]
    upstream = v[:6][:, masked[0] > -np.inf]
    for dim in (1, 0):
        turn = (lambda y: y) if dim else (lambda y: np.ascontiguousarray(y.T))
        for f in FORWARD:
            got = turn(f(turn(x), dim, variant=variant))
            hole = 0 if f is stablemax else -np.inf
            assert (got[:6, 3::5] == hole).all() and np.isnan(got[6:10]).all()
            assert np.isfinite(got[10]).all()
            close(got[:6][:, masked[0] > -np.inf], *exact(f, kept, 1), dtype)
            grad = turn(BACKWARD[f](turn(v), turn(x), dim, variant=variant))
            assert (grad[:6, 3::5] == 0).all() and np.isnan(grad[6:10]).all()
            if f is stablemax:  # what is masked takes part in the sum of v of the logarithms
                close(grad[:6][:, masked[0] > -np.inf], *exact(f, kept, 1, upstream), dtype)
            assert np.isfinite(grad[10]).all()


@pytest.mark.parametrize("dim", [0, 1])
def test_extreme_values(dim):
    x = np.float32([[3e38, 1e38, -3e38, 0], [1e-38, -1e-45, 0, 0], [-3e38, -3e38, -3e38, -1e38]])
    turn = (lambda y: y) if dim else (lambda y: np.ascontiguousarray(y.T))
    p, logs = (turn(f(turn(x), dim)) for f in FORWARD)
    np.testing.assert_allclose(p[0], [0.75, 0.25, 0, 2.5e-39], rtol=2e-7, atol=1e-45)
    np.testing.assert_allclose(p[1], 0.25)
    np.testing.assert_allclose(p[2], [1 / 6, 1 / 6, 1 / 6, 1 / 2], rtol=3e-7)
    want, _ = exact(log_stablemax, x, 1)
    np.testing.assert_allclose(logs.astype(np.longdouble), want, rtol=3e-7)
    top = np.float64([[1.7e308, 0.0], [-1.7e308, -1.7e308]])
    np.testing.assert_allclose(log_stablemax(top)[1], -np.log(2), rtol=1e-15)
    np.testing.assert_allclose(log_stablemax(top)[0], [0, -np.log(1.7e308)], atol=1e-300)


# ---- exactness and memory ------------------------------------------------------------------------


def test_same_bits_at_every_level_and_thread_count():
    script = """
import hashlib, numpy as np, flcore
from flcore.ops import stablemax, log_stablemax, stablemax_backward, log_stablemax_backward
rng, digest = np.random.default_rng(1), hashlib.sha256()
for dtype in (np.float32, np.float64, np.float16):
    for shape, dim in (((3, 1), 1), ((5, 77), 1), ((3, 3001), 1), ((2, 70, 301), 1), ((9, 5), 0)):
        for scale in (1, 1e3):
            x = (scale * rng.standard_normal(shape)).astype(dtype)
            v = rng.standard_normal(shape).astype(dtype)
            for f in (stablemax, log_stablemax):
                digest.update(f(x, dim).tobytes())
            for f in (stablemax_backward, log_stablemax_backward):
                digest.update(f(v, x, dim).tobytes())
x = rng.standard_normal((40, 9001)).astype(np.float32)
for threads in (1, 2, 3):
    flcore.set_num_threads(threads)
    for dim in (0, 1):
        digest.update(log_stablemax(x, dim).tobytes())
print(digest.hexdigest())
"""
    assert len(set(outputs_per_level(script).values())) == 1


@pytest.mark.parametrize("dim", [0, 1])
def test_threads_do_not_change_a_bit(dim, rng):
    x, v = draw(rng, (300, 1200), "float32"), draw(rng, (300, 1200), "float32")
    found = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        results = [f(x, dim).tobytes() for f in FORWARD]
        found.add((*results, *(f(v, x, dim).tobytes() for f in BACKWARD.values())))
    assert len(found) == 1


def test_strided_unaligned_and_read_only(rng):
    base, other = draw(rng, (8, 60, 50), "float32"), draw(rng, (8, 60, 50), "float32")
    other.flags.writeable = False
    views = [
        lambda y: y[:, :, :40],
        lambda y: y[::2],
        lambda y: y[:, ::3, ::-1],
        lambda y: y.transpose(1, 0, 2),
        lambda y: y.transpose(2, 1, 0),
        lambda y: y[0].T,
        lambda y: y[3, 7, ::5],
        lambda y: np.broadcast_to(y[:1, :1], (4, 6, 50)),
        lambda y: y.astype(">f4"),
        lambda y: np.asfortranarray(y),
    ]
    for view in views:
        x, v = view(base), view(other)
        for dim in range(x.ndim):
            for f in FORWARD:
                native = x.astype(np.float32)
                want = f(np.ascontiguousarray(native), dim)
                got = f(x, dim)
                assert got.dtype.isnative and got.shape == x.shape
                np.testing.assert_allclose(got, want, rtol=1e-6)
                plain = np.ascontiguousarray(v.astype(np.float32))
                want = BACKWARD[f](plain, np.ascontiguousarray(native), dim)
                for upstream in (v, plain if x.dtype.isnative else v):
                    got = BACKWARD[f](upstream, x, dim)
                    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
    for n in (1, 16, 33, 1500):
        x = draw(rng, (3, n), "float32")
        for f in FORWARD:
            assert f(unaligned(x), 1).tobytes() == f(x, 1).tobytes()


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: stablemax([1.0]), DTypeError, "x: expected a NumPy array or a torch tensor"),
        (lambda: stablemax(np.arange(3)), DTypeError, "x: expected float64, float32"),
        (lambda: stablemax(X, 1), InvalidInputError, "dim: expected a dimension of 1, got 1"),
        (lambda: stablemax(np.float64(3)[None][0:0].sum(keepdims=True)[0]), DTypeError, "x: exp"),
        (lambda: log_stablemax(X, 0.5), DTypeError, "dim: expected an integer, got 0.5"),
        (lambda: stablemax_backward(X[:2], X), InvalidInputError, r"v: expected the shape of x"),
        (lambda: stablemax_backward(None, X), DTypeError, "v: expected an array like x"),
        (lambda: log_stablemax_backward(np.float32(X), X), DTypeError, "v: expected float64 as x"),
        (lambda: stablemax(X, variant="fast"), InvalidInputError, "variant: expected one of"),
    ],
)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
