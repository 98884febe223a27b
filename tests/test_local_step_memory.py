"""Local steps: odd memory, what may not overlap, and errors that name the argument."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flcore.errors import DTypeError, InvalidInputError, VariantUnavailableError
from flcore.ops import local_step, local_step_rows
from support import DTYPES, Guarded, np_dtype, unaligned
from test_local_step import draw

# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_arrays_and_guarded_outputs(dtype, rng):
    for size in (1, 5, 16, 33, 4099):
        x, g, q, buffer = draw(rng, size, dtype, 4)
        options = {"lr": 0.1, "clip": 1.0, "momentum": 0.9}
        want, state = x.copy(), buffer.copy()
        local_step(want, g, q, buffer=state, **options)
        out, guarded = Guarded(size, np_dtype(dtype), 1), Guarded(size, np_dtype(dtype), 2)
        out.array[:], guarded.array[:] = x, buffer
        odd_g, odd_q = unaligned(g, 1), unaligned(q, 1)
        odd_g.flags.writeable = odd_q.flags.writeable = False
        local_step(out.array, odd_g, odd_q, buffer=guarded.array, **options)
        out.check()
        guarded.check()
        assert out.array.tobytes() == want.tobytes()
        assert guarded.array.tobytes() == state.tobytes()


def test_strided_and_transposed_tensors(rng):
    x, g = rng.standard_normal((2, 40, 30))
    for index in (np.s_[::2, ::3], np.s_[::-1]):
        want = np.ascontiguousarray(x[index])
        local_step(want, np.ascontiguousarray(g[index]), lr=0.1, clip=1.0)
        strided = x.copy()
        local_step(strided[index], g[index], lr=0.1, clip=1.0)
        np.testing.assert_allclose(strided[index], want, rtol=1e-13)
        rest = np.ones(x.shape, bool)
        rest[index] = False
        assert (strided[rest] == x[rest]).all()
    want = x.copy()
    local_step(want, g, lr=0.1)
    for grad in (g, np.asfortranarray(g)):
        turned = np.asfortranarray(x)
        local_step(turned, grad, lr=0.1)
        assert (turned == want).all()


def test_rows_of_wider_matrices(rng):
    """Columns of one matrix that holds everything, which kernels read where they are."""
    board = rng.standard_normal((4, 3 * 50 + 7))
    before = board.copy()
    x, g, q = (board[:, i : i + 50] for i in (0, 52, 104))
    want = x.copy()
    local_step_rows(want, g.copy(), q.copy(), lr=0.1, clip=1.0)
    local_step_rows(x, g, q, lr=0.1, clip=1.0)
    assert (x == want).all() and (board[:, 50:] == before[:, 50:]).all()
    turned = np.asfortranarray(g)  # only read: copied
    again = before[:, :50].copy()
    local_step_rows(again, turned, q, lr=0.1, clip=1.0)
    assert (again == want).all()


# ---- bad input ---------------------------------------------------------------------------------

X = np.ones((4, 3), np.float32)
G = 2 * X
LOCKED = X.copy()
LOCKED.flags.writeable = False


@pytest.mark.parametrize(
    ("x", "g", "options", "error", "message"),
    [
        (X, G[:3], {}, InvalidInputError, r"g: expected shape \(4, 3\)"),
        (X, G.astype(np.float64), {}, DTypeError, "g: expected dtype float32"),
        ([X], G, {}, DTypeError, "g: expected a list or tuple"),
        ([X, G], [G], {}, InvalidInputError, "g: expected 2 layers"),
        (X.astype(int), X.astype(int), {}, DTypeError, "x: expected float64"),
        (LOCKED, G, {}, InvalidInputError, "x: the array is read-only"),
        (X, X, {}, InvalidInputError, "x: it shares memory with g"),
        ([X[0], X[0]], [G[0], G[1]], {}, InvalidInputError, "x: two tensors share memory"),
        (X, G, {"buffer": G}, InvalidInputError, "buffer: it shares memory with g"),
        (X, G, {"momentum": 0.9}, InvalidInputError, "buffer: momentum needs a buffer"),
        (X, G, {"clip_mode": "half"}, InvalidInputError, "clip_mode: expected one of"),
        (X, G, {"clip": 0.0}, InvalidInputError, "clip: expected a number above 0, or None"),
        (X, G, {"clip": math.nan}, InvalidInputError, "clip: expected a number above 0"),
        (X, G, {"lr": math.inf}, InvalidInputError, "lr: expected a finite number, got inf"),
        (X, G, {"lr": True}, InvalidInputError, "lr: expected a finite number, got True"),
        (X, G, {"decay": [0.1]}, InvalidInputError, "decay: expected a finite number"),
        (X, G, {"alpha": "1"}, InvalidInputError, "alpha: expected a finite number, got '1'"),
        (X, G, {"variant": "cuda"}, VariantUnavailableError, "no cuda variant"),
    ],
)
def test_bad_input_is_named(x, g, options, error, message):
    with pytest.raises(error, match=message):
        local_step(x, g, **{"lr": 0.1, **options})
    assert (X == 1).all() and (G == 2).all()


@pytest.mark.parametrize(
    ("x", "g", "options", "error", "message"),
    [
        ([X], G, {}, DTypeError, r"x: expected an array \(rows, d\), got list"),
        (X[0], G[0], {}, InvalidInputError, r"x: expected \(rows, d\), got shape \(3,\)"),
        (X, G[:, :2], {}, InvalidInputError, r"g: expected shape \(4, 3\), got \(4, 2\)"),
        (X, G.astype(np.float16), {}, DTypeError, "g: expected float32 on cpu, got float16"),
        (X, [G], {}, DTypeError, "g: expected a NumPy array like x, got list"),
        (X, G, {"q": G[0, :2]}, InvalidInputError, r"q: expected shape \(4, 3\) or \(3,\)"),
        (X.astype(int), X.astype(int), {}, DTypeError, "x: expected float64"),
        (LOCKED, G, {}, InvalidInputError, "x: the array is read-only"),
        (X.T, G.T, {}, InvalidInputError, "x: expected rows whose values lie one after"),
        (X, X, {}, InvalidInputError, "x: it shares memory with g"),
        (X, G, {"q": X[1]}, InvalidInputError, "x: it shares memory with q"),
        (X[:3], X[1:], {}, InvalidInputError, "x: it shares memory with g"),
        (X, G, {"lr": [0.1, 0.2]}, InvalidInputError, r"lr: expected one number, or \(4,\)"),
        (X, G, {"decay": [0, 0, 0, math.nan]}, InvalidInputError, "decay: .* in every place"),
        (X, G, {"clip": [1, 1, 1, -1]}, InvalidInputError, "clip: .* in every place"),
        (X, G, {"momentum": [0, 0, 0, 0.1]}, InvalidInputError, "buffer: momentum needs"),
        (X, G, {"active": 5}, InvalidInputError, r"active: expected \(4,\) of bool"),
        (X, G, {"active": [1, 0, 1, 0]}, InvalidInputError, "active: expected"),
        (X, G, {"active": np.ones(3, bool)}, InvalidInputError, "active: expected"),
    ],
)
def test_bad_rows_are_named(x, g, options, error, message):
    with pytest.raises(error, match=message):
        local_step_rows(x, g, **{"lr": 0.1, **options})
    assert (X == 1).all() and (G == 2).all()
