"""Row losses on odd memory: layouts, guards, values that are not finite, errors, the pool."""

from __future__ import annotations

import numpy as np
import pytest

from flcore import _output_pool, _variants
from flcore.errors import DTypeError, InvalidInputError, LabelError, VariantUnavailableError
from flcore.ops.rowloss import (
    MAPS,
    RowLossForm,
    RowStats,
    row_loss,
    row_loss_backward,
    row_loss_gradient,
    row_targets,
)
from support import DTYPES, HAS_TORCH, Guarded, np_dtype, unaligned

VARIANTS = [
    v for v, why in _variants.available("rowloss", "cpu").items() if not why and v != "triton"
]
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")


def logits(rng, *shape: int, dtype: str = "float32") -> np.ndarray:
    return (3 * rng.standard_normal(shape)).astype(np_dtype(dtype))


def labels(rng, classes: int, *shape: int) -> np.ndarray:
    return np.where(rng.random(shape) < 0.2, -100, rng.integers(0, classes, shape))


PLAIN = RowLossForm()


def both_ways(x, y, form=PLAIN, **options):
    """Loss and gradient in one visit, checked against forward and backward."""
    loss, grad = row_loss_gradient(x, y, form, **options)
    options.pop("out", None)
    alone, stats = row_loss(x, y, form, **options)
    np.testing.assert_array_equal(alone, loss)
    back = row_loss_backward(x, y, stats, form, **options)
    np.testing.assert_allclose(
        back.astype(np.float64),
        grad.astype(np.float64),
        rtol=1e-2 if x.itemsize == 2 else 3e-6,
        atol=1e-6 if form.label_smoothing else 0,
    )
    return loss, grad


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 12, 64, 70, 300])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_slice_of_a_sequence_is_read_where_it_lies(variant, classes, dtype, rng):
    whole = logits(rng, 5, 13, classes, dtype=dtype)
    x, y = whole[:, 2:], labels(rng, classes, 5, 11)
    for kind in MAPS:
        got = both_ways(x, y, RowLossForm(kind), variant=variant)
        want = both_ways(x.copy(), y, RowLossForm(kind), variant=variant)
        assert got[0].shape == (5, 11) and got[1].shape == x.shape
        assert [g.tobytes() for g in got] == [w.tobytes() for w in want]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 9, 21), (1, 300, 7), (3, 65, 2), (5, 1, 3), (2, 3, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_classes_in_any_dimension(variant, shape, dtype, rng):
    x = logits(rng, *shape, dtype=dtype)
    for kind in MAPS:
        for dim in range(3):
            y = labels(rng, shape[dim], *(shape[:dim] + shape[dim + 1 :]))
            loss, grad = both_ways(x, y, RowLossForm(kind), class_dim=dim, variant=variant)
            last = np.ascontiguousarray(np.moveaxis(x, dim, -1))
            want, slope = both_ways(last, y, RowLossForm(kind), variant=variant)
            wide = dtype == "float64"
            np.testing.assert_allclose(loss, want, rtol=1e-13 if wide else 1e-6)
            np.testing.assert_allclose(
                grad.astype(np.float64),
                np.moveaxis(slope, -1, dim).astype(np.float64),
                rtol={8: 1e-12, 4: 2e-6, 2: 1e-2}[x.itemsize],
                atol={8: 0, 4: 0, 2: 1e-6}[x.itemsize],
            )
            assert grad.strides == x.strides  # dense as the logits are


VIEWS = {
    "rows apart": lambda b: b[::2, ::3],
    "classes apart": lambda b: b[:, :, ::2],
    "backwards": lambda b: b[::-1, :, ::-1],
    "transposed": lambda b: b.transpose(1, 0, 2),
    "broadcast": lambda b: np.broadcast_to(b[:1], b.shape),
    "foreign order of bytes": lambda b: b.astype(">f4"),
    "classes first": lambda b: np.asfortranarray(b),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_view_gives_the_loss_of_its_copy(variant, view, rng):
    x = VIEWS[view](logits(rng, 6, 9, 20))
    y = labels(rng, x.shape[-1], *x.shape[:-1])
    for base in (x, x[:, :0], x[:0]):
        target = y[: base.shape[0], : base.shape[1]]
        loss, grad = both_ways(base, target, variant=variant)
        want, slope = both_ways(np.array(base, np.float32, order="C"), target, variant=variant)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
        np.testing.assert_allclose(grad, slope, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_of_any_layout(variant, rng):
    x, y = logits(rng, 6, 20, 5), labels(rng, 20, 6, 5)
    want, slope = row_loss_gradient(x, y, class_dim=1, variant=variant)
    for out in (
        np.full((6, 20, 5), 7, np.float32),
        np.full((5, 20, 6), 7, np.float32).transpose(2, 1, 0),
        np.full((6, 5, 20), 7, np.float32).transpose(0, 2, 1),
        np.full((6, 40, 5), 7, np.float32)[:, ::2],
    ):
        loss, grad = row_loss_gradient(x, y, class_dim=1, out=out, variant=variant)
        assert grad is out
        np.testing.assert_allclose(out, slope, rtol=2e-6)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
    rows, into = np.ascontiguousarray(np.moveaxis(x, 1, 2)), np.zeros((6, 5), np.float32)
    assert row_loss(rows, y, out=into, variant=variant)[0] is into
    np.testing.assert_allclose(into, want, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 3, 17, 64, 65, 257])
def test_the_gradient_may_overwrite_the_logits(classes, dtype, rng):
    for kind in MAPS:
        x, y = logits(rng, 37, classes, dtype=dtype), labels(rng, classes, 37)
        loss, grad = row_loss_gradient(x, y, RowLossForm(kind))
        _, stats = row_loss(x, y, RowLossForm(kind))
        separate = row_loss_backward(x, y, stats, RowLossForm(kind))
        twin = x.copy()
        again, same = row_loss_gradient(x, y, RowLossForm(kind), out=x)
        assert same is x and x.tobytes() == grad.tobytes() and again.tobytes() == loss.tobytes()
        row_loss_backward(twin, y, stats, RowLossForm(kind), out=twin)
        assert twin.tobytes() == separate.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_and_read_only_logits_and_guarded_outputs(dtype, rng):
    for classes in (1, 5, 16, 33, 64, 65, 1000):
        x, y = logits(rng, 9, classes, dtype=dtype), labels(rng, classes, 9)
        for kind in MAPS:
            want, slope = row_loss_gradient(x, y, RowLossForm(kind))
            shifted, out = unaligned(x, 1), Guarded(x.size, x.dtype, 1)
            shifted.flags.writeable = False
            moved = unaligned(y.astype(np.int32), 2)
            grad = out.array.reshape(x.shape)
            loss, _ = row_loss_gradient(shifted, moved, RowLossForm(kind), out=grad)
            out.check()
            assert grad.tobytes() == slope.tobytes() and loss.tobytes() == want.tobytes()


@needs_torch
def test_torch_gives_the_bits_of_numpy(rng):
    import torch

    x, y = logits(rng, 8, 30), labels(rng, 30, 8)
    want, slope = row_loss_gradient(x, y, weight=np.arange(30.0))
    for kind in (torch.int32, torch.int64, torch.int16):
        target = torch.from_numpy(y).to(kind)
        loss, grad = row_loss_gradient(
            torch.from_numpy(x).requires_grad_(), target, weight=torch.arange(30.0)
        )
        assert loss.numpy().tobytes() == want.tobytes() and not loss.requires_grad
        assert grad.numpy().tobytes() == slope.tobytes()
    half = torch.from_numpy(x).bfloat16()
    got, slope = row_loss_gradient(half, torch.from_numpy(y))
    exact, want = row_loss_gradient(half.double(), torch.from_numpy(y))
    assert got.dtype == torch.float32 and slope.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(slope.double(), want, rtol=2**-8, atol=1e-30)


@needs_torch
def test_probabilities_in_a_wider_type_are_not_rounded(rng):
    import torch

    x = torch.from_numpy(logits(rng, 8, 30)).bfloat16()
    q = torch.from_numpy(rng.dirichlet(np.ones(30), 8)).float()
    loss, grad = row_loss_gradient(x, q)
    want, slope = row_loss_gradient(x.double(), q.double())
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), slope, rtol=2**-7, atol=1e-6)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 64, 65, 900])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_do_not_count_are_not_read(variant, kind, dtype, classes, rng):
    x, y = logits(rng, 20, classes, dtype=dtype), rng.integers(0, classes, 20)
    form = RowLossForm(kind, label_smoothing=0.1, z_loss=0.1)
    mask = rng.random(20) < 0.5
    want, slope = row_loss_gradient(x, y, form, variant=variant)
    x[~mask] = np.nan
    x[~mask, 0] = np.inf
    left_out = np.where(mask, y, -100)
    odd = np.where(mask, y, 10**6)  # labels that are no class, where the mask says so
    for target, valid in ((left_out, None), (odd, mask)):
        loss, grad = both_ways(x, target, form, valid_mask=valid, variant=variant)
        assert (loss[~mask] == 0).all() and (grad[~mask] == 0).all()
        assert loss[mask].tobytes() == want[mask].tobytes()
        assert grad[mask].tobytes() == slope[mask].tobytes()


@pytest.mark.parametrize("classes", [4, 64, 65, 900])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_classes_have_no_share(variant, kind, dtype, classes, rng):
    x, y = logits(rng, 20, classes, dtype=dtype), rng.integers(0, classes - 1, 20)
    x[:, -1] = -np.inf
    loss, grad = both_ways(x, y, RowLossForm(kind), variant=variant)
    assert (grad[:, -1] == 0).all() and np.isfinite(loss).all()
    assert np.isfinite(grad.astype(np.float32)).all()
    short = np.ascontiguousarray(x[:, :-1])
    want, slope = both_ways(short, y, RowLossForm(kind), variant=variant)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    prior = np.zeros(classes)
    prior[-1] = -np.inf
    x[:, -1] = 1
    for smoothing in (0.0, 0.2):
        form = RowLossForm(kind, label_smoothing=smoothing)
        masked, grad = both_ways(x, y, form, log_prior=prior, variant=variant)
        want, slope = both_ways(short, y, form, variant=variant)
        np.testing.assert_allclose(masked, want, rtol=2e-6)
        assert (grad[:, -1] == 0).all()
        np.testing.assert_allclose(
            grad[:, :-1].astype(np.float64), slope.astype(np.float64), rtol=1e-2, atol=1e-6
        )


@pytest.mark.parametrize("classes", [4, 64, 65, 900])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_and_infinity_spoil_their_row_alone(variant, kind, value, classes, rng):
    x, y = logits(rng, 20, classes), np.arange(20) % 3
    want, slope = row_loss_gradient(x, y, RowLossForm(kind), variant=variant)
    x[4, classes - 1] = value
    x[5, y[5]] = value
    loss, grad = both_ways(x, y, RowLossForm(kind), variant=variant)
    for row in (4, 5):
        assert np.isnan(loss[row]) and np.isnan(grad[row]).all()
    others = np.delete(np.arange(20), [4, 5])
    assert loss[others].tobytes() == want[others].tobytes()
    assert grad[others].tobytes() == slope[others].tobytes()


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_masked_target_costs_infinitely_much(variant, kind):
    x = np.float32([[-np.inf, 0, 1]])
    loss, grad = row_loss_gradient(x, np.array([0]), RowLossForm(kind), variant=variant)
    assert loss[0] == np.inf and np.isfinite(grad).all()
    x = np.full((1, 3), -np.inf, np.float32)
    loss, grad = row_loss_gradient(x, np.array([0]), RowLossForm(kind), variant=variant)
    assert np.isnan(loss[0]) and np.isnan(grad).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_exactly_one(variant):
    for dtype in DTYPES:
        x = np.ones((2, 5), np_dtype(dtype))
        loss, grad = row_loss_gradient(x, np.array([0, 4]), variant=variant)
        np.testing.assert_allclose(loss, np.log(5), rtol=1e-6)
        want = [[-0.4, 0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1, -0.4]]
        np.testing.assert_allclose(grad.astype(np.float64), want, rtol=4e-3)


# ---- errors --------------------------------------------------------------------------------------

X, Y = np.ones((4, 3), np.float32), np.array([0, 1, 2, -100])
BAD_CALLS = [
    ({"x": [1.0]}, DTypeError, "x: expected a NumPy array"),
    ({"x": X.astype(int)}, DTypeError, "x: expected float64"),
    ({"target": [0, 1]}, DTypeError, "target: expected a NumPy array"),
    ({"target": Y[:3]}, InvalidInputError, r"labels of shape \(4,\)"),
    ({"target": Y > 0}, DTypeError, "target: expected integer labels"),
    ({"target": X[:2]}, InvalidInputError, "probabilities of the shape of x"),
    ({"target": np.array([0, 3, 0, 7])}, LabelError, r"labels 0 .. 2.* row 1 has 3"),
    ({"target": np.array([0, -1, 0, 0])}, LabelError, "row 1 has -1"),
    ({"log_prior": np.log([0.5, 0.5, 0])}, LabelError, "row 2 has label 2, a class with prior 0"),
    ({"class_dim": 2}, InvalidInputError, "class_dim: expected a dimension of 2"),
    ({"class_dim": 0.5}, DTypeError, "class_dim: expected an integer"),
    ({"weight": [1, 2]}, InvalidInputError, r"weight: expected shape \(3,\)"),
    ({"weight": "abc"}, DTypeError, "weight: expected numbers"),
    ({"row_scale": np.ones(3)}, InvalidInputError, r"row_scale: expected shape \(4,\)"),
    ({"upstream": np.ones(3)}, InvalidInputError, r"upstream: expected shape \(4,\)"),
    ({"valid_mask": Y}, DTypeError, "valid_mask: expected an array of bool"),
    ({"valid_mask": Y[:2] > 0}, InvalidInputError, "valid_mask: expected the shape"),
    ({"out": np.ones((3, 4), np.float32)}, InvalidInputError, "out: expected the shape of x"),
    ({"out": np.ones((4, 3))}, DTypeError, "out: expected float32"),
    ({"form": "stablemax"}, DTypeError, "form: expected a RowLossForm"),
    ({"variant": "cuda"}, VariantUnavailableError, "no cuda variant"),
    ({"target": X, "form": RowLossForm(tau=2)}, InvalidInputError, "tau, margin: need class"),
    ({"x": X[:, :0]}, InvalidInputError, "at least one class|labels"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_CALLS)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        row_loss_gradient(**{"x": X, "target": Y, "form": RowLossForm(), **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"map": "sparsemax"}, InvalidInputError, "map: expected one of"),
        ({"label_smoothing": 1.5}, InvalidInputError, r"in \[0, 1\]"),
        ({"tau": -1}, InvalidInputError, "tau"),
        ({"margin": float("nan")}, InvalidInputError, "margin: expected a finite number"),
        ({"z_loss": "a"}, DTypeError, "z_loss: expected a number"),
        ({"ignore_index": 0.5}, DTypeError, "ignore_index: expected an integer"),
        ({"shard": True, "label_smoothing": 0.1}, InvalidInputError, "shard cannot smooth"),
    ],
)
def test_bad_forms_are_named(options, error, message):
    with pytest.raises(error, match=message):
        RowLossForm(**options)


def test_bad_labels_are_an_index_error_and_nothing_is_written():
    out = np.full((4, 3), 7, np.float32)
    with pytest.raises(IndexError) as caught:
        row_loss_gradient(X, np.array([0, 0, 9, 0]), out=out)
    assert caught.value.row == 2 and (out == 7).all()
    with pytest.raises(LabelError):
        row_targets(np.array([0, 3]), 3)
    with pytest.raises(InvalidInputError, match="merged stats"):
        row_loss_gradient(X, Y, RowLossForm(shard=True))
    with pytest.raises(InvalidInputError, match=r"stats\.own: expected shape"):
        row_loss_backward(X, Y, RowStats(np.ones(4), np.ones(3)))


# ---- output pool ---------------------------------------------------------------------------------


def test_large_gradients_reuse_memory(monkeypatch):
    monkeypatch.setattr(_output_pool, "SMALLEST", 1 << 12)
    _output_pool.clear_cache()
    x, y = np.zeros((64, 64), np.float32), np.zeros(64, np.int64)
    first = row_loss_gradient(x, y)[1]
    second = row_loss_gradient(x, y)[1]
    assert not np.shares_memory(first, second)
    place, view = first.ctypes.data, first[3:5]
    del first
    third = row_loss_gradient(x, y)[1]
    assert third.ctypes.data != place  # a view keeps the buffer
    del view
    assert row_loss_gradient(x, y)[1].ctypes.data == place
    many = [row_loss_gradient(x, y)[1] for _ in range(2 * _output_pool.BUFFERS)]
    assert len({m.ctypes.data for m in many}) == len(many)
    assert len(_output_pool._buffers) <= _output_pool.BUFFERS
    del many, second, third
    _output_pool.clear_cache()
    assert not _output_pool._buffers
    monkeypatch.setenv("FLCORE_OUTPUT_POOL", "0")
    assert row_loss_gradient(x, y)[1].base is None and not _output_pool._buffers


@needs_torch
def test_the_pool_keeps_dtype_and_strides(monkeypatch):
    import torch

    monkeypatch.setattr(_output_pool, "SMALLEST", 1 << 10)
    base = torch.zeros(8, 20, 30, dtype=torch.bfloat16)
    for x in (base, base.transpose(0, 2), base[:, 3:], base.expand(8, 20, 30)[::2]):
        y = torch.empty_like(x)
        got = _output_pool.empty_like(x)
        assert (got.shape, got.stride(), got.dtype) == (y.shape, y.stride(), y.dtype)
        place = got.data_ptr()
        got.fill_(1)
        kept = got[0]
        del got
        assert _output_pool.empty_like(x).data_ptr() != place
        del kept
    for x in (base.float().numpy(), base.float().numpy().transpose(2, 0, 1)):
        assert _output_pool.empty_like(x).strides == np.empty_like(x).strides
    _output_pool.clear_cache()
