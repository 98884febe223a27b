"""Shifts, SAM points and ends of rounds: worked numbers, the reference, memory, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flcore.errors import DTypeError, InvalidInputError
from flcore.ops import (
    global_norm,
    local_step,
    round_end,
    round_end_rows,
    sam_shift,
    sam_shift_rows,
    shift,
    shift_rows,
)
from support import DTYPES, EPS, HAS_TORCH, SIZES, Guarded, np_dtype, unaligned
from test_local_step import VARIANTS, draw, wide

# ---- by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_points_by_hand(variant):
    x, g = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    assert (shift(x, g, 0.5, variant=variant) == [2.5, 4.0]).all()
    np.testing.assert_allclose(sam_shift(x, g, 0.5, eps=0.0, variant=variant), [1.3, 2.4])
    np.testing.assert_allclose(sam_shift(x, g, 0.5, eps=5.0, variant=variant), [1.15, 2.2])
    both = sam_shift(x, g, 0.5, alpha=2.0, q=-g, eps=0.0, variant=variant)
    np.testing.assert_allclose(both, [1.3, 2.4])
    rows = sam_shift_rows(np.zeros((2, 2)), np.stack([g, 2 * g]), [0.5, 1.0], variant=variant)
    np.testing.assert_allclose(rows, [[0.3, 0.4], [0.6, 0.8]], rtol=1e-7)
    assert (shift_rows(np.stack([x, x]), np.stack([g, g]), [0.0, 1.0])[1] == [4.0, 6.0]).all()
    assert (x == [1, 2]).all() and (g == [3, 4]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_ends_of_rounds_by_hand(variant):
    """Two steps of 0.1 along gradients (1, -2), so u = (-0.2, 0.4) and 1 / (K lr) = 5."""
    w = np.array([1.0, 1.0])
    x = w - 0.2 * np.array([1.0, -2.0])
    assert np.allclose(round_end(x, w, variant=variant), [-0.2, 0.4])
    h = np.array([1.0, 0.0])
    assert np.allclose(round_end(x, w, kind="dual", state=h, variant=variant), [-0.2, 0.4])
    assert np.allclose(h, [0.8, 0.4])
    own, c = np.array([0.5, 0.5]), np.array([0.25, 0.0])
    round_end(x, w, kind="control", state=own, c=c, scale=5.0, variant=variant)
    assert np.allclose(own, [0.5 - 0.25 + 1.0, 0.5 - 2.0])  # c_i - c + the mean gradient


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_zero_gradient_stays_and_one_that_is_not_finite_shows(variant):
    x = np.array([1.0, 2.0])
    assert (sam_shift(x, 0 * x, 0.5, variant=variant) == x).all()
    for bad in (np.nan, np.inf):
        assert np.isnan(sam_shift(x, np.array([bad, 1.0]), 0.5, variant=variant)).all()


# ---- against the reference, and laws -------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_matches_the_reference(dtype, rng):
    given = [draw(rng, size, dtype, 4) for size in SIZES]
    x, g, q, state = (list(tensors) for tensors in zip(*given, strict=True))
    unit = 8 * max(EPS[dtype], EPS["float64"])

    def check(function) -> None:
        found = []
        for variant in ("cpu", "reference"):
            mine = [v.copy() for v in state]
            found.append([*function(mine, variant), *mine])
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype == np_dtype(dtype)
            assert (np.abs(wide(a) - wide(b)) <= unit * (np.abs(wide(b)) + 8)).all()

    check(lambda mine, v: shift(x, g, -0.7, variant=v))
    check(lambda mine, v: sam_shift(x, g, 0.3, variant=v))
    check(lambda mine, v: sam_shift(x, g, 0.3, q=q, alpha=0.5, variant=v))
    check(lambda mine, v: round_end(x, g, variant=v))
    check(lambda mine, v: round_end(x, g, kind="dual", state=mine, variant=v))
    check(lambda m, v: round_end(x, g, kind="control", state=m, c=q, scale=2.0, variant=v))
    norms = [global_norm(g, q, alpha=0.5, variant=v) for v in ("cpu", "reference")]
    assert abs(norms[0] / norms[1] - 1) < (1e-14 if dtype == "float64" else 1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_rows_are_models(dtype, rng):
    x, g, h, c = draw(rng, (3, 4099), dtype, 4)
    rho, scale = [0.1, 0.2, 0.3], np.array([1.0, 2.0, 3.0])
    flags = np.array([True, False, True])
    before = np.full_like(x, 7)
    for active, took in ((None, np.ones(3, bool)), (2, np.arange(3) < 2), (flags, flags)):
        mine, out = h.copy(), before.copy()
        ended = round_end_rows(
            x, g, kind="control", state=mine, c=c[0], scale=scale, out=out, active=active
        )
        assert ended is out
        point = sam_shift_rows(x, g, rho, q=c[0], out=before.copy(), active=active)
        moved = shift_rows(x, g, rho, out=before.copy(), active=active)
        for i in range(3):
            own = h[i].copy()
            u = round_end(x[i], g[i], kind="control", state=own, c=c[0], scale=scale[i])
            wanted = (u, own, sam_shift(x[i], g[i], rho[i], q=c[0]), shift(x[i], g[i], rho[i]))
            if not took[i]:
                wanted = (before[i], h[i], before[i], before[i])
            for got, want in zip((out, mine, point, moved), wanted, strict=True):
                assert got[i].tobytes() == want.tobytes()


def test_a_scaffold_client_is_local_steps_and_an_end(rng):
    """c_i - c - u / (K lr) is the mean of the gradients of the steps (option II of the paper)."""
    w, c, own = rng.standard_normal((3, 30))
    grads = rng.standard_normal((4, 30))
    x, kept = w.copy(), own.copy()
    for g in grads:
        local_step(x, g, c - own, lr=0.05)
    u = round_end(x, w, kind="control", state=kept, c=c, scale=1 / (4 * 0.05))
    np.testing.assert_allclose(kept, grads.mean(0), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(u, x - w, rtol=0, atol=0)


def test_a_feddyn_client_is_the_gradient_of_its_loss(rng):
    """q = lam (h - w) and decay lam: the penalty lam <x, h> + lam/2 |x - w|^2, differentiated."""
    w, h, g = rng.standard_normal((3, 30))
    lam, x = 0.1, rng.standard_normal(30)
    want = x - 0.3 * (g + lam * h + lam * (x - w))
    local_step(x, g, lam * (h - w), lr=0.3, decay=lam)
    np.testing.assert_allclose(x, want, rtol=1e-13)


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_arrays_and_guarded_outputs(dtype, rng):
    for size in (1, 33, 4099):
        x, g, c, h = draw(rng, size, dtype, 4)
        own = h.copy()
        want = [
            sam_shift(x, g, 0.3),
            round_end(x, g, kind="control", state=own, c=c, scale=2.0),
            own,
        ]
        odd = [unaligned(v, 1) for v in (x, g, c)]
        for v in odd:
            v.flags.writeable = False
        out, end, state = (Guarded(size, np_dtype(dtype), i) for i in (1, 2, 3))
        state.array[:] = h
        sam_shift(odd[0], odd[1], 0.3, out=out.array)
        round_end(
            odd[0], odd[1], kind="control", state=state.array, c=odd[2], scale=2.0, out=end.array
        )
        for guarded, values in zip((out, end, state), want, strict=True):
            guarded.check()
            assert guarded.array.tobytes() == values.tobytes()


def test_results_may_take_the_place_of_an_argument(rng):
    x, g = rng.standard_normal((2, 3, 50))
    for function in (
        lambda a, b, out: sam_shift(a, b, 0.3, out=out),
        lambda a, b, out: sam_shift_rows(a, b, 0.3, out=out),
        lambda a, b, out: round_end(a, b, out=out),
        lambda a, b, out: shift_rows(a, b, 0.3, out=out),
    ):
        want = function(x, g, None)
        for place in (0, 1):
            pair = [x.copy(), g.copy()]
            assert function(*pair, pair[place]) is pair[place]
            assert (pair[place] == want).all()
        shifted = np.zeros(151)
        shifted[:150] = x.ravel()
        one, other = shifted[:150].reshape(3, 50), shifted[1:].reshape(3, 50)
        with pytest.raises(InvalidInputError, match="out: it shares memory with x"):
            function(one, g, other)


def test_structures_and_new_arrays(rng):
    x = {"a": rng.standard_normal((2, 3)), "b": rng.standard_normal(4).astype(np.float32)}
    g = {name: v * 2 for name, v in x.items()}
    point = shift(x, g, 1.0)
    assert list(point) == ["a", "b"] and point["b"].dtype == np.float32
    assert np.allclose(point["a"], 3 * x["a"])
    turned = shift(x["a"].T, g["a"].T, 1.0)  # not contiguous
    assert np.allclose(turned, point["a"].T)


# ---- errors --------------------------------------------------------------------------------------

X = np.ones((2, 3))
G = 2 * X


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: round_end(X, G, kind="duel"), InvalidInputError, "kind: expected one of"),
        (lambda: round_end(X, G, kind="dual"), InvalidInputError, "state: is needed"),
        (lambda: round_end(X, G, state=3 * X), InvalidInputError, "state: is not used"),
        (lambda: round_end(X, G, kind="control", state=3 * X), InvalidInputError, "c: is needed"),
        (
            lambda: round_end_rows(X, G, kind="control", state=3 * X, c=X + 1),
            InvalidInputError,
            "scale: is needed",
        ),
        (lambda: round_end(X, G, kind="dual", state=X), InvalidInputError, "state: it shares"),
        (lambda: round_end_rows(X, G[:1]), InvalidInputError, r"w: expected shape \(2, 3\)"),
        (lambda: shift(X, G, math.nan), InvalidInputError, "s: expected a finite number"),
        (lambda: shift(X, G, [1.0, 2.0]), InvalidInputError, "s: expected a finite number"),
        (lambda: shift_rows([X], G, 1.0), DTypeError, r"x: expected an array \(rows, d\)"),
        (lambda: shift_rows(X, G, [1.0]), InvalidInputError, "s: expected one number, or"),
        (lambda: sam_shift(X, G, "1"), InvalidInputError, "rho: expected a finite number"),
        (lambda: sam_shift(X, G, 1.0, eps=None), InvalidInputError, "eps: expected a finite"),
        (lambda: sam_shift(X, G, 1.0, out=X[:1]), InvalidInputError, "out: expected shape"),
        (lambda: global_norm(X.astype(int)), DTypeError, "g: expected float64"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert (X == 1).all() and (G == 2).all()


# ---- torch -------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_tensors_of_any_dense_order():
    import torch

    torch.manual_seed(0)
    x, g = torch.randn(2, 4, 3, 5, 5)
    last = x.to(memory_format=torch.channels_last)
    want = sam_shift(x, g, 0.5)
    torch.testing.assert_close(want, x + 0.5 * g / g.norm())
    torch.testing.assert_close(sam_shift(last, g, 0.5), want)
    state = torch.zeros_like(last)
    torch.testing.assert_close(round_end(last, g, kind="dual", state=state), x - g)
    torch.testing.assert_close(state, (x - g).to(memory_format=torch.channels_last))
    half = torch.randn(3, 7, dtype=torch.bfloat16)
    assert round_end_rows(half, half).dtype == torch.bfloat16
