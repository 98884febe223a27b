"""Row losses of a few classes: every number up to 65, layouts, memory, elementary functions."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest

from flcore.ops.rowloss import (
    RowLossForm,
    RowStats,
    row_loss,
    row_loss_backward,
    row_loss_gradient,
)
from support import EPS, np_dtype, outputs_per_level

SOFTMAX = RowLossForm(map="softmax")


def problem(seed: int, rows: int, classes: int, dtype: str = "float32", ignored: float = 0.2):
    rng = np.random.default_rng(seed)
    x = (3 * rng.standard_normal((rows, classes))).astype(np_dtype(dtype))
    y = rng.integers(0, classes, rows).astype(np.int32 if seed % 2 else np.int64)
    y[rng.random(rows) < ignored] = -100
    return x, y


def wide(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def assert_agrees(got, want, dtype: str) -> None:
    """Loss and gradient against float64 ones; the gradient is rounded to `dtype` once."""
    np.testing.assert_allclose(got[0], want[0], rtol=1e-13 if dtype == "float64" else 5e-7)
    step = 2e-6 if dtype == "float32" else 1e-12 if dtype == "float64" else 1.1 * EPS[dtype]
    least = 6e-8 if dtype == "float16" else 0
    np.testing.assert_allclose(wide(got[1]), wide(want[1]), rtol=step, atol=least)


# ---- the elementary functions, seen through the op ----------------------------------------------


@pytest.mark.parametrize("top", [0.0, 0.75, -17.3, 200.0, 4096.0, -70000.0, 2.0**20])
def test_exponential(top):
    gap = np.concatenate([np.linspace(0, 86, 4000), np.geomspace(1e-6, 1, 500)])
    x = np.stack([np.full(len(gap), top), top - gap], axis=1).astype(np.float32)
    exact = np.exp(wide(x[:, 1]) - wide(x[:, 0]))
    loss, stats = row_loss(x, np.zeros(len(gap), np.int64), SOFTMAX)
    np.testing.assert_allclose(wide(stats.rest) / wide(stats.own), exact, rtol=4e-7)
    np.testing.assert_allclose(loss, np.log1p(exact), rtol=5e-7)
    x64 = wide(x)
    loss, stats = row_loss(x64, np.zeros(len(gap), np.int64), SOFTMAX)
    np.testing.assert_allclose(stats.rest / stats.own, exact, rtol=2e-15)


def test_logarithm_of_ratios_from_tiny_to_huge():
    # R = 1, e_y = 1 + z or 1 / (1 - z): the loss is log1p of their ratio
    z = np.concatenate([np.geomspace(1e-3, 1e30, 3000), -np.geomspace(1e-3, 1e30, 3000)])
    x = np.stack([z, np.zeros(len(z))], axis=1)
    for dtype, rtol in (("float32", 5e-7), ("float64", 2e-15)):
        given = x.astype(dtype)
        loss, _ = row_loss(given, np.zeros(len(z), np.int64))
        u = wide(given[:, 0])
        ratio = np.where(u >= 0, 1 / (1 + np.abs(u)), 1 + np.abs(u))
        np.testing.assert_allclose(loss, np.log1p(ratio), rtol=rtol)


def test_loss_beyond_the_range_of_exp():
    x = np.float32([[0, 200, -50], [-1000, 1000, 3]])
    loss, grad = row_loss_gradient(x, np.array([0, 0]), SOFTMAX)
    np.testing.assert_allclose(loss, [200, 2000], rtol=1e-6)
    np.testing.assert_allclose(grad, [[-1, 1, 0], [-1, 1, 0]])
    # the comp-sum members keep their slope: phi = exp(-tau' l)
    gce = RowLossForm(map="softmax", tau=1.25)
    loss, grad = row_loss_gradient(x[:1], np.array([0]), gce)
    np.testing.assert_allclose(loss, [4], rtol=1e-6)
    np.testing.assert_allclose(grad[0, :2], np.exp(-50.0) * np.array([-1, 1]), rtol=1e-5)


# ---- every small size ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "stablemax", "taylor"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_every_number_of_classes(name, dtype):
    form = RowLossForm(map=name)
    for classes in range(1, 66):
        x, y = problem(classes, 3 + 31 * (classes % 3), classes, dtype)
        want = row_loss_gradient(x, y, form, variant="reference")
        got = row_loss_gradient(x, y, form, variant="cpu")
        assert_agrees(got, want, dtype)
        loss, stats = row_loss(x, y, form, variant="cpu")
        assert loss.tobytes() == got[0].tobytes()
        again = row_loss_backward(x, y, stats, form, variant="cpu")
        if classes <= 64:
            assert again.tobytes() == got[1].tobytes()
        else:
            assert_agrees((loss, again), want, dtype)
        assert not wide(got[1])[y == -100].any()


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 15, 16, 17, 127, 128, 129, 1030])
def test_every_tail_of_rows(rows):
    x, y = problem(rows, rows, 12)
    assert_agrees(row_loss_gradient(x, y), row_loss_gradient(x, y, variant="reference"), "float32")


def test_bfloat16():
    torch = pytest.importorskip("torch")
    for classes in (1, 2, 5, 11, 12, 64):
        x, y = problem(classes, 50, classes)
        x = torch.from_numpy(x).bfloat16()
        loss, grad = row_loss_gradient(x, torch.from_numpy(y))
        want = row_loss_gradient(x.double(), torch.from_numpy(y), variant="reference")
        np.testing.assert_allclose(loss, want[0], rtol=5e-7)
        np.testing.assert_array_equal(grad.float(), want[1].bfloat16().float())


def test_a_row_does_not_depend_on_its_neighbours():
    for form in (RowLossForm(), SOFTMAX, RowLossForm(label_smoothing=0.1, z_loss=1e-3)):
        x, y = problem(3, 37, 11)
        x[5] = np.nan
        x[20] = np.inf
        y[[5, 20]] = -100
        y[6] = 4
        loss, grad = row_loss_gradient(x, y, form)
        for i in range(len(y)):
            alone = row_loss_gradient(x[i : i + 1], y[i : i + 1], form)
            assert alone[0].tobytes() == loss[i : i + 1].tobytes()
            assert alone[1].tobytes() == grad[i : i + 1].tobytes()


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5, 21, 64, 65, 150])
@pytest.mark.parametrize("beside", [2, 3, 16, 40, 65])
def test_classes_in_the_middle(classes, beside):
    x, y = problem(beside, 3 * beside, classes)
    middle = np.ascontiguousarray(x.reshape(3, beside, classes).transpose(0, 2, 1))
    labels = y.reshape(3, beside)
    for name in ("softmax", "stablemax"):
        form = RowLossForm(map=name)
        want = row_loss_gradient(x, y, form, variant="reference")
        loss, grad = row_loss_gradient(middle, labels, form, class_dim=1)
        assert loss.shape == labels.shape and grad.shape == middle.shape
        flat = grad.transpose(0, 2, 1).reshape(x.shape)
        assert_agrees((loss.reshape(-1), flat), want, "float32")
        if classes <= 64:
            rows = row_loss_gradient(x, y, form)
            assert rows[0].tobytes() == loss.tobytes()
            assert rows[1].tobytes() == np.ascontiguousarray(flat).tobytes()


def test_long_columns_are_summed_in_double():
    # 20,000 terms of one row: float32 partial sums alone would be 1e-6 off
    x = np.full((1, 20000, 16), 0.1, np.float32)
    loss, _ = row_loss(x, np.zeros((1, 16), np.int64), class_dim=1)
    np.testing.assert_allclose(loss, np.log(20000), rtol=2e-7)


@pytest.mark.parametrize("classes", [3, 12, 33])
def test_rows_at_two_distances(classes):
    # a prefix of every sequence is left out, as models with an embedded prefix do it
    rng = np.random.default_rng(classes)
    whole = rng.standard_normal((4, 9 + 5, classes)).astype(np.float32)
    x, y = whole[:, 5:], rng.integers(0, classes, (4, 9))
    before = whole.copy()
    want = row_loss_gradient(np.ascontiguousarray(x), y)
    got = row_loss_gradient(x, y)
    assert got[0].tobytes() == want[0].tobytes()
    assert np.ascontiguousarray(got[1]).tobytes() == want[1].tobytes()
    np.testing.assert_array_equal(whole, before)
    row_loss_gradient(x, y, out=x)
    np.testing.assert_array_equal(whole[:, :5], before[:, :5])
    np.testing.assert_array_equal(whole[:, 5:], want[1])


@pytest.mark.parametrize("classes", [1, 3, 4, 5, 12, 31])
@pytest.mark.parametrize("rows", [1, 5, 16, 33])
def test_nothing_outside_the_rows_is_touched(rows, classes):
    # logits and gradient end where a page begins that cannot be read
    libc = ctypes.CDLL(None, use_errno=True)
    page, pages = mmap.PAGESIZE, []

    def guarded(like: np.ndarray) -> np.ndarray:
        size = -(-like.nbytes // page) * page
        memory = mmap.mmap(-1, size + page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert libc.mprotect(ctypes.c_void_p(base + size), ctypes.c_size_t(page), 0) == 0
        pages.append((memory, base, size))
        array = np.frombuffer(memory, like.dtype, like.size, size - like.nbytes)
        array = array.reshape(like.shape)
        array[...] = like
        return array

    x, y = problem(rows, rows, classes)
    for dtype in ("float32", "float16", "float64"):
        given, labels = guarded(x.astype(dtype)), guarded(y)
        out = guarded(np.zeros_like(given))
        for form in (RowLossForm(), SOFTMAX, RowLossForm(label_smoothing=0.1)):
            _, grad = row_loss_gradient(given, labels, form, out=out)
            want = row_loss_gradient(x.astype(dtype), y, form)[1]
            assert grad.tobytes() == want.tobytes()
    for _, base, size in pages:
        libc.mprotect(ctypes.c_void_p(base + size), ctypes.c_size_t(page), 3)


# ---- options -------------------------------------------------------------------------------------


def test_two_shards_add_up():
    x, y = problem(4, 40, 24, ignored=0)
    for name in ("softmax", "stablemax"):
        form = RowLossForm(map=name)
        loss, stats = row_loss(x, y, form)
        parts = [
            row_loss(
                np.ascontiguousarray(x[:, half : half + 12]),
                y,
                RowLossForm(map=name, label_offset=half, shard=True),
            )[1]
            for half in (0, 12)
        ]
        top = (
            np.zeros(40, np.float32)
            if name == "stablemax"
            else np.maximum(parts[0].shift, parts[1].shift)
        )
        factors = [1 if p.shift is None else np.exp(p.shift - top) for p in parts]
        rest = sum(p.rest * f for p, f in zip(parts, factors, strict=True))
        own = sum(p.own * f for p, f in zip(parts, factors, strict=True))
        np.testing.assert_allclose(np.log1p(rest / own), loss, rtol=1e-6)
        merged = RowStats(rest, own, None if name == "stablemax" else top)
        want = row_loss_backward(x, y, stats, form)
        for half in (0, 12):
            shard = RowLossForm(map=name, label_offset=half, shard=True)
            part = np.ascontiguousarray(x[:, half : half + 12])
            np.testing.assert_allclose(
                row_loss_backward(part, y, merged, shard), want[:, half : half + 12], rtol=2e-6
            )


def test_infinite_and_missing_numbers():
    x = np.float32([[1, -np.inf, 1], [1, np.inf, 0], [np.nan, 0, 0], [1, 1, 1]])
    for form in (RowLossForm(), SOFTMAX):
        loss, grad = row_loss_gradient(x, np.array([0, 0, 1, 2]), form)
        np.testing.assert_allclose(loss[[0, 3]], np.log([2, 3]), rtol=1e-6)
        assert grad[0, 1] == 0 and np.isfinite(grad[[0, 3]]).all()
        assert np.isnan(loss[1:3]).all() and np.isnan(grad[1:3]).all()


def test_same_bits_at_every_level_and_thread_count():
    script = """
import hashlib
import numpy as np
import flcore
from flcore.ops.rowloss import RowLossForm, row_loss, row_loss_backward, row_loss_gradient
digest = hashlib.sha256()
for classes in (1, 2, 3, 4, 7, 11, 12, 16, 33, 64):
    rng = np.random.default_rng(classes)
    x = (5 * rng.standard_normal((1500, classes))).astype(np.float32)
    x[rng.random(x.shape) < 0.02] = -np.inf
    x[:, 0] = 0.5
    y = rng.integers(0, classes, 1500)
    y[::9] = -100
    for form in (RowLossForm(), RowLossForm(map="softmax"), RowLossForm(map="softmax", tau=1.5),
                 RowLossForm(label_smoothing=0.1, z_loss=0.01), RowLossForm(map="taylor")):
        if form.map == "taylor" or form.label_smoothing:
            x = np.maximum(x, -20)
        for dtype in ("float32", "float16", "float64"):
            once = set()
            for threads in (1, 2, 3):
                flcore.set_num_threads(threads)
                given = x.astype(dtype)
                loss, grad = row_loss_gradient(given, y, form)
                middle = np.ascontiguousarray(given.reshape(3, 500, -1).transpose(0, 2, 1))
                beside = row_loss_gradient(middle, y.reshape(3, 500), form, class_dim=1)
                once.add(b"".join(a.tobytes() for a in (loss, grad, *beside)))
            assert len(once) == 1
            digest.update(once.pop())
print(digest.hexdigest())
"""
    assert len(set(outputs_per_level(script).values())) == 1
