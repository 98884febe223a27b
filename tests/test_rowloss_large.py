"""Row losses whose gradients are written past the caches, or whose rows are split or recomputed."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.ops.rowloss import RowLossForm, row_loss, row_loss_backward, row_loss_gradient
from support import np_dtype, outputs_per_level

STREAMED = 9 << 20  # bytes of a gradient that no cache is asked to keep


def logits(rows: int, classes: int, dtype: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = (3 * rng.standard_normal((rows, classes), np.float32)).astype(np_dtype(dtype))
    return x, rng.integers(0, classes, rows)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["stablemax", "softmax", "taylor"])
@pytest.mark.parametrize(("classes", "offset"), [(4500, 0), (4501, 3), (1001, 1)])
def test_past_the_caches_is_the_same(name, dtype, classes, offset):
    """Every row of a large gradient has the bits it has alone, wherever it begins in memory."""
    form = RowLossForm(map=name)
    rows = STREAMED // (classes * np_dtype(dtype).itemsize) + 1
    x, y = logits(rows, classes, dtype)
    y[5] = form.ignore_index
    room = np.full(rows * classes + 64, 7, x.dtype)
    out = room[offset : offset + rows * classes].reshape(rows, classes)
    loss, grad = row_loss_gradient(x, y, form, out=out, variant="cpu")
    _, stats = row_loss(x, y, form, variant="cpu")
    assert grad is out and not grad[5].any()
    assert (room[:offset] == 7).all() and (room[offset + rows * classes :] == 7).all()
    picked = [0, 1, 4, 6, rows // 2, rows - 1]
    alone = [row_loss_gradient(x[i : i + 1], y[i : i + 1], form, variant="cpu") for i in picked]
    for i, (one_loss, one_grad) in zip(picked, alone, strict=True):
        assert loss[i] == one_loss[0]
        assert grad[i].tobytes() == one_grad[0].tobytes()
    both = grad.copy()
    row_loss_backward(x, y, stats, form, out=out, variant="cpu")
    np.testing.assert_allclose(out.astype(np.float64), both.astype(np.float64), 8e-3, 1e-6)
    row_loss_gradient(x, y, form, out=x, variant="cpu")
    assert x.tobytes() == both.tobytes()


@pytest.mark.parametrize("name", ["stablemax", "softmax"])
@pytest.mark.parametrize("classes", [50_000, 300_000])
def test_one_row_on_all_threads(name, classes):
    """A row cut into blocks has the loss and gradient of the row among others; also a row whose
    derivatives do not stay in cache."""
    form = RowLossForm(map=name)
    x, y = logits(4, classes, "float32", seed=1)
    loss, grad = row_loss_gradient(x, y, form, variant="cpu")
    for i in range(4):
        one_loss, one_grad = row_loss_gradient(x[i : i + 1], y[i : i + 1], form, variant="cpu")
        assert loss[i] == one_loss[0]
        assert grad[i].tobytes() == one_grad[0].tobytes()
    want, exact = row_loss_gradient(x.astype(np.float64), y, form, variant="reference")
    np.testing.assert_allclose(loss, want, 5e-7)
    np.testing.assert_allclose(grad, exact, 1e-6, 1e-30)


@pytest.mark.parametrize("base", [-3000.0, -50.0, 60.0, 90.0, 5000.0])
def test_blocks_of_far_apart_logits(base):
    """Blocks of classes keep shifts of their own: entries hold their digits below the largest."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 3 * 4096 + 77)).astype(np.float32)
    x[:, 4096:8192] += 39
    x[:, 8192:] -= 30
    x += np.float32(base)
    x[0, 5] = base + 80
    y = np.array([5, 4100, 9000])
    form = RowLossForm(map="softmax")
    loss, grad = row_loss_gradient(x, y, form, variant="cpu", scale=1e-4)
    want, exact = row_loss_gradient(x.astype(np.float64), y, form, variant="reference", scale=1e-4)
    np.testing.assert_allclose(loss, want, 5e-7)
    np.testing.assert_allclose(grad, exact, 1e-6, 1e-37)


def test_levels_write_the_same_small_entries():
    """Gradients in bfloat16 below 2^-126 are 0 at every level, and all else is the same too."""
    script = (
        "import hashlib, ml_dtypes, numpy as np\n"
        "from flcore.ops.rowloss import RowLossForm, row_loss_gradient\n"
        "x = 40 * np.random.default_rng(3).standard_normal((4, 5000))\n"
        "x = x.astype(ml_dtypes.bfloat16)\n"
        "form = RowLossForm(map='softmax')\n"
        "g = row_loss_gradient(x, np.arange(4), form, variant='cpu')[1]\n"
        "small = np.abs(g.astype(float)) < 2.0**-126\n"
        "print(hashlib.sha256(g.tobytes()).hexdigest(), (g[small] == 0).all(), small.sum() > 500)"
    )
    printed = outputs_per_level(script)
    assert len(set(printed.values())) == 1, printed
    assert printed.popitem()[1].split()[1:] == ["True", "True"]
