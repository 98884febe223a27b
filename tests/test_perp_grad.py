"""Projected gradients: worked examples, variants against the reference, limits, memory, errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flcore
from flcore import _native, _variants
from flcore.errors import DTypeError, InvalidInputError, VariantUnavailableError
from flcore.ops import perp_grad
from flcore.reference import perp_grad as reference
from support import DTYPES, EPS, HAS_TORCH, SIZES, Guarded, np_dtype, outputs_per_level, unaligned

VARIANTS = [v for v, why in _variants.available("perp_grad", "cpu").items() if not why]
SCOPES = ("tensor", "global")
JOIN = _native.core.PERP_JOIN * _native.core.PERP_TILE  # values of which a lane takes one tile


def pair(rng: np.random.Generator, size: int, dtype: str = "float32", noise: float = 1.0):
    """Weights, and a gradient whose part across them is `noise` of the part along them."""
    w = rng.standard_normal(size)
    g = 0.37 * (w + noise * rng.standard_normal(size))
    return w.astype(np_dtype(dtype)), g.astype(np_dtype(dtype))


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def across(w: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The projection in extended precision."""
    w, g = w.astype(np.longdouble), g.astype(np.longdouble)
    return g - (w @ g) / (w @ w) * w


# ---- by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_elements_by_hand(variant, scope, dtype):
    w = np.array([3, 4], dtype)
    for renormalize, want in ((True, [-1.788854382, 1.3416407865]), (False, [-0.32, 0.24])):
        g = np.array([1, 2], dtype)
        got = perp_grad(w, g, scope=scope, renormalize=renormalize, variant=variant)
        assert got is g
        np.testing.assert_allclose(g, want, rtol=1e-9 if dtype == "float64" else 1e-7)
    assert (w == [3, 4]).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_limits_by_hand(variant, dtype):
    options = {"variant": variant}
    g = np.array([2, 0], dtype)
    assert (perp_grad(np.array([1, 0], dtype), g, **options) == 0).all()  # g = k w
    g = np.array([1, -2, 0.5], dtype)
    assert (perp_grad(np.zeros(3, dtype), g, **options) == [1, -2, 0.5]).all()  # w = 0
    g = np.zeros(3, dtype)
    assert (perp_grad(np.ones(3, dtype), g, **options) == 0).all()  # g = 0
    g = np.array([3], dtype)
    assert perp_grad(np.array([2], dtype), g, **options)[0] == 3  # frozen for ever otherwise
    g = np.array([0, 5], dtype)
    assert (perp_grad(np.array([7, 0], dtype), g, **options) == [0, 5]).all()  # across already


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_multiple_of_the_weights_leaves_nothing(variant, rng):
    """Whatever the sums round to: c is not exactly k, and what it leaves must not be stretched."""
    factors = [k for k in (-3.0, 1 / 3, 1e-20, 7e8) for _ in range(3)]
    w = [rng.standard_normal(n) for n in 4 * (2, 100, 600 if variant == "triton" else 5000)]
    for options in ({}, {"floor": 0.0}, {"renormalize": False}):
        g = perp_grad(
            w, [k * x for k, x in zip(factors, w, strict=True)], variant=variant, **options
        )
        assert not any(x.any() for x in g)


def test_scope_global_is_one_long_vector(rng):
    w, g = zip(*(pair(rng, n, "float64") for n in (1, 7, 4097, 300)), strict=True)
    whole = perp_grad(np.concatenate(w), np.concatenate(g))
    layers = [x.copy() for x in g]
    perp_grad(list(w), layers, scope="global")
    np.testing.assert_allclose(np.concatenate(layers), whole, rtol=1e-13, atol=1e-15)
    apart = perp_grad(list(w), [x.copy() for x in g])
    assert apart[0] == g[0] and not np.allclose(np.concatenate(apart), whole)


# ---- against the reference -----------------------------------------------------------------------


def check(w, g, dtype: str, **options) -> None:
    got = perp_grad(w, [x.copy() for x in g], **options)
    want = perp_grad(w, [x.copy() for x in g], variant="reference", **options)
    for a, b, x in zip(got, want, g, strict=True):
        scale = np.abs(wide(b)).max(initial=0)  # a rounding, and sums that round otherwise
        # tiny: values that round to numbers below the smallest normal one
        bound = EPS[dtype] * np.abs(wide(b)) + 1e-12 * scale + (6e-8 if dtype == "float16" else 0)
        assert a.dtype == x.dtype and (np.abs(wide(a) - wide(b)) <= bound).all(), options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", SCOPES)
def test_cpu_matches_the_reference(scope, dtype, rng):
    pairs = [pair(rng, size, dtype) for size in SIZES]
    w, g = zip(*pairs, strict=True)
    for renormalize in (True, False):
        check(list(w), list(g), dtype, scope=scope, renormalize=renormalize)
    check(list(w), list(g), dtype, scope=scope, eps=30.0)
    assert perp_grad([], []) == []


def test_a_mixture_of_dtypes_shapes_and_structures(rng):
    w = {name: pair(rng, 360, name)[0].reshape(3, 4, 30) for name in DTYPES}
    g = {name: pair(rng, 360, name)[1].reshape(3, 4, 30) for name in DTYPES}
    flat = {name: perp_grad(w[name].ravel(), g[name].ravel().copy()) for name in DTYPES}
    perp_grad(w, g)
    for name in DTYPES:
        assert g[name].tobytes() == flat[name].tobytes()


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
def test_sums_in_float64_stand_gradients_along_the_weights(noise, rng):
    """float32 sums are off by 3e-4, 4.5e-2 and 1.0 here."""
    w, g = pair(rng, 1_000_000, "float32", noise)
    exact = float(np.linalg.norm(across(w, g)))
    p = perp_grad(w, g.copy(), renormalize=False)
    assert abs(np.linalg.norm(wide(p)) / exact - 1) < 1e-7  # the rounding of p itself
    stretched = perp_grad(w, g.copy())
    assert abs(np.linalg.norm(wide(stretched)) / np.linalg.norm(wide(g)) - 1) < 1e-7


@pytest.mark.parametrize("noise", [1e-5, 1e-7, 1e-9, 1e-11])
def test_what_cancels_is_measured(noise, rng):
    w, g = pair(rng, 100_000, "float64", noise)
    got = perp_grad(w, g.copy(), floor=0.0)
    want = across(w, g)
    cosine = float((got @ want) / np.linalg.norm(got) / np.linalg.norm(wide(want)))
    assert cosine > 1 - 1e-8 and np.isclose(np.linalg.norm(got), np.linalg.norm(g), rtol=1e-12)


def test_below_the_floor_nothing_is_stretched(rng):
    w, g = pair(rng, 10_000, "float64", 1e-7)
    p = perp_grad(w, g.copy(), renormalize=False)
    assert perp_grad(w, g.copy()).tobytes() == p.tobytes()
    stretched = perp_grad(w, g.copy(), floor=1e-8)
    np.testing.assert_allclose(stretched, p * np.linalg.norm(g) / np.linalg.norm(p), rtol=1e-9)


def test_eps_is_added_in_both_places():
    w, g = np.array([3.0, 4.0]), np.array([1.0, 2.0])
    p = g - 11 / (25 + 0.5) * w
    got = perp_grad(w, g.copy(), eps=0.5)
    np.testing.assert_allclose(got, p * np.sqrt(5) / (np.linalg.norm(p) + 0.5), rtol=1e-14)


def test_tensors_of_one_dimension_can_be_left_out(rng):
    w = [rng.standard_normal((4, 5)), rng.standard_normal(5)]
    for scope in SCOPES:
        g = [rng.standard_normal((4, 5)), rng.standard_normal(5)]
        before = [x.copy() for x in g]
        perp_grad(w, g, scope=scope, skip_1d=True)
        assert (g[1] == before[1]).all()
        assert g[0].tobytes() == perp_grad(w[0], before[0]).tobytes()


# ---- what must hold ------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 17, 400]), st.sampled_from([1.0, 1e-3]))
def test_laws(seed, size, noise):
    rng = np.random.default_rng(seed)
    w, g = pair(rng, size, "float64", noise)
    out = perp_grad(w, g.copy())
    lengths = np.linalg.norm(w) * np.linalg.norm(g)
    assert abs(w @ out) <= 1e-13 * lengths / noise
    assert np.isclose(np.linalg.norm(out), np.linalg.norm(g), rtol=1e-11)
    near = {"rtol": 1e-9, "atol": 1e-11 * np.abs(g).max() / noise}
    np.testing.assert_allclose(perp_grad(w, out.copy()), out, **near)  # idempotent
    np.testing.assert_allclose(
        perp_grad(-5.0 * w, g.copy()), out, **near
    )  # whatever the scale of w
    assert perp_grad(w, -g).tobytes() == (-out).tobytes()  # odd
    assert perp_grad(w, 4 * g).tobytes() == (4 * out).tobytes()
    p = perp_grad(w, g.copy(), renormalize=False)
    assert np.linalg.norm(p) <= np.linalg.norm(g) * (1 + 1e-15) and p @ g >= 0
    grown = np.sum((w - 0.1 * out) ** 2)  # weights can only grow
    assert np.isclose(grown, w @ w + 0.01 * (out @ out), rtol=1e-12)


def test_half_types_are_rounded_once(rng):
    for dtype in ("bfloat16", "float16"):
        w, g = pair(rng, 4099, dtype)
        exact = perp_grad(wide(w), wide(g))
        assert perp_grad(w, g).tobytes() == exact.astype(np_dtype(dtype)).tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["weights", "grads"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_not_finite_passes_into_its_tensor_only(variant, where, value, rng):
    w, g = zip(*(pair(rng, 40) for _ in range(3)), strict=True)
    (w if where == "weights" else g)[1][7] = value
    want = [perp_grad(w[i], g[i].copy()) for i in (0, 2)]
    with np.errstate(invalid="ignore"):
        perp_grad(list(w), list(g), variant=variant)
    assert np.isnan(g[1]).all()
    if variant == "cpu":
        assert [g[0].tobytes(), g[2].tobytes()] == [x.tobytes() for x in want]


def test_extreme_values(rng):
    w, g = pair(rng, 1000)
    want = wide(perp_grad(w, g.copy()))
    for scale in (2.0**-100, 2.0**110):  # beyond the squares of float32; eps would be seen below
        out = perp_grad(np.float32(scale) * w, np.float32(scale) * g, eps=0.0)
        np.testing.assert_allclose(wide(out) / scale, want, rtol=1e-7)
    w = np.float32([2e38, -3e38, 1e38])
    assert np.isfinite(perp_grad(w, np.float32([3e38, 3e38, 1e38]))).all()
    w = rng.standard_normal(100)
    want = perp_grad(w, np.roll(w, 1))
    for scale in (2.0**-490, 2.0**490):
        out = perp_grad(scale * w, scale * np.roll(w, 1), eps=0.0)
        np.testing.assert_allclose(out / scale, want, rtol=1e-12)


# ---- exactness ---------------------------------------------------------------------------------


def test_same_bits_at_every_level_and_thread_count():
    script = """
import hashlib, numpy as np, flcore
from flcore.ops import perp_grad
rng, digest = np.random.default_rng(1), hashlib.sha256()
sizes = (2, 15, 16, 17, 4095, 4097, 9000)
for dtype in (np.float32, np.float64, np.float16):
    for noise in (1, 1e-5):
        for scope in ("tensor", "global"):
            w = [rng.standard_normal(n).astype(dtype) for n in sizes]
            g = [(x + noise * rng.standard_normal(len(x))).astype(dtype) for x in w]
            for x in perp_grad(w, g, scope=scope):
                digest.update(x.tobytes())
w, noise = rng.standard_normal((2, 600_001)).astype(np.float32)
for threads in (1, 2, 3):
    flcore.set_num_threads(threads)
    digest.update(perp_grad(w, w + noise).tobytes())
    digest.update(perp_grad(w, w + noise * np.float32(1e-5)).tobytes())
print(digest.hexdigest())
"""
    assert len(set(outputs_per_level(script).values())) == 1


@pytest.mark.parametrize("noise", [1.0, 1e-5])
def test_threads_and_company_do_not_change_a_bit(noise, rng):
    w, g = pair(rng, JOIN + 70_001, "float32", noise)
    found = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        found.add(perp_grad(w, g.copy()).tobytes())
        layers = [g[:9000].copy(), g.copy(), g[:1].copy(), g[1:500].copy()]
        found.add(perp_grad([w[:9000], w, w[:1], w[1:500]], layers)[1].tobytes())
    assert len(found) == 1


def test_groups_that_share_the_cache_do_not_change_a_bit(rng):
    """Many small tensors, one beyond a group's bytes, and empty ones between them."""
    sizes = (0, 900_000, 0, 700_000, 3, 2_000_000, 0)
    pairs = [pair(rng, size) for size in sizes]
    together = perp_grad([w for w, _ in pairs], [g.copy() for _, g in pairs])
    for (w, g), out in zip(pairs, together, strict=True):
        assert perp_grad(w, g).tobytes() == out.tobytes()


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", [1.0, 1e-5, 0.0])
def test_unaligned_arrays_and_guarded_gradients(noise, dtype, rng):
    for size in (2, 5, 16, 33, 4099):
        w, g = pair(rng, size, dtype, noise)
        want = perp_grad(w, g.copy())
        out = Guarded(size, np_dtype(dtype), 1)
        out.array[:] = g
        shifted = unaligned(w, 1)
        shifted.flags.writeable = False
        perp_grad(shifted, out.array)
        out.check()
        assert out.array.tobytes() == want.tobytes()


def test_strided_and_transposed_arrays(rng):
    w, g = rng.standard_normal((2, 40, 30))
    for index in (np.s_[::2, ::3], np.s_[::-1]):
        want = perp_grad(w[index].copy(), g[index].copy())
        strided = g.copy()
        perp_grad(w[index], strided[index])
        np.testing.assert_allclose(strided[index], want, rtol=1e-13)
        rest = np.ones(g.shape, bool)
        rest[index] = False
        assert (strided[rest] == g[rest]).all()
    want = perp_grad(w, g.copy())
    for weights in (w, np.asfortranarray(w)):
        turned = np.asfortranarray(g)
        perp_grad(weights, turned)
        np.testing.assert_allclose(turned, want, rtol=1e-12, atol=1e-15)
    swapped = g.astype(">f8")
    np.testing.assert_array_equal(perp_grad(w.astype(">f8"), swapped).astype(float), want)


# ---- bad input ---------------------------------------------------------------------------------

X = np.ones((4, 3), np.float32)
LOCKED = X.copy()
LOCKED.flags.writeable = False


@pytest.mark.parametrize(
    ("weights", "grads", "options", "error", "message"),
    [
        (X, X[:3].copy(), {}, InvalidInputError, r"grads: expected shape \(4, 3\)"),
        (X, X.astype(np.float64), {}, DTypeError, "grads: expected dtype float32"),
        ([X], X.copy(), {}, DTypeError, "grads: expected a list or tuple"),
        ([X, X], [X.copy()], {}, InvalidInputError, "grads: expected 2 layers"),
        ({"a": X}, {"b": X}, {}, InvalidInputError, "grads: expected the keys"),
        (X.astype(int), X.astype(int), {}, DTypeError, "weights: expected float64"),
        (X.astype(complex), X.astype(complex), {}, DTypeError, "got complex128"),
        (X, LOCKED, {}, InvalidInputError, "grads: the array is read-only"),
        (X, X, {}, InvalidInputError, "grads: a gradient shares memory with a weight"),
        ("abc", X, {}, DTypeError, "weights: expected an array"),
        (X, X.copy(), {"scope": "layer"}, InvalidInputError, "scope: expected one of"),
        (X, X.copy(), {"renormalize": 1}, InvalidInputError, "renormalize: expected True or False"),
        (X, X.copy(), {"eps": -1}, InvalidInputError, "eps: expected a finite number from 0"),
        (X, X.copy(), {"floor": np.nan}, InvalidInputError, "floor: expected a finite number"),
        (X, X.copy(), {"variant": "cuda"}, VariantUnavailableError, "no cuda variant"),
    ],
)
def test_bad_input_is_named(weights, grads, options, error, message):
    with pytest.raises(error, match=message):
        perp_grad(weights, grads, **options)


def test_gradients_that_share_memory_are_refused():
    g = np.ones(7, np.float32)
    with pytest.raises(InvalidInputError, match="two gradients share memory"):
        perp_grad([X[0], X[1]], [g[:3], g[2:5]])
    assert (g == 1).all()


def test_numbers_agree_between_python_and_cpp():
    assert reference.NOTHING == _native.core.PERP_NOTHING


# ---- torch -------------------------------------------------------------------------------------

if HAS_TORCH:
    import torch


needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")


@needs_torch
def test_tensors_are_written_in_place_and_in_any_dense_order():
    torch.manual_seed(0)
    w = torch.nn.Conv2d(3, 5, 3).weight
    g = torch.randn_like(w)
    want = torch.from_numpy(perp_grad(w.detach().numpy(), g.numpy().copy()))
    for weights in (w, w.detach().to(memory_format=torch.channels_last)):
        last = g.clone().to(memory_format=torch.channels_last)
        version = last._version
        assert perp_grad(weights, last) is last and last._version > version
        assert last.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(last, want)
    parts = torch.randn(4, 10, dtype=torch.bfloat16)
    whole = parts.clone()
    perp_grad(torch.ones(4, 5, dtype=torch.bfloat16), parts[:, ::2])
    assert torch.equal(parts[:, 1::2], whole[:, 1::2])
    assert not torch.equal(parts[:, ::2], whole[:, ::2])


@needs_torch
def test_opcheck_and_compile():
    from flcore import _torch_perp_grad

    torch.manual_seed(0)
    weights = [torch.randn(4, 5), torch.randn(7)]
    grads = [torch.randn(4, 5), torch.randn(7)]
    arguments = ("tensor", True, 1e-30, 1e-6, False)
    torch.library.opcheck(_torch_perp_grad.perp_grad, (weights, grads, *arguments))
    torch._dynamo.reset()
    eager = perp_grad(weights, [g.clone() for g in grads], skip_1d=True)
    function = torch.compile(
        lambda w, g: perp_grad(w, g, skip_1d=True), fullgraph=True, backend="aot_eager"
    )
    compiled = [g.clone() for g in grads]
    function(weights, compiled)
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)
