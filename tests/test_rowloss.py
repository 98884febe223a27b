"""Row losses: worked examples, the reference against autograd, variants against the reference."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from flcore import _variants
from flcore.ops.rowloss import (
    MAPS,
    RowLossForm,
    RowStats,
    row_loss,
    row_loss_backward,
    row_loss_gradient,
    row_targets,
)
from support import DTYPES, EPS, HAS_TORCH, np_dtype

VARIANTS = [v for v, why in _variants.available("rowloss", "cpu").items() if not why]
FAST = [v for v in VARIANTS if v != "triton"]
CLASSES = (1, 2, 3, 17, 64, 65, 1000, 5000)
FORMS = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1},
    "scaled": {"logit_scale": 0.5},
    "margin": {"margin": -0.75},
    "z": {"z_loss": 0.01},
    "mae": {"tau": 2.0},
    "gce": {"tau": 1.7},
    "exponential": {"tau": 0.5},
    "all": {
        "label_smoothing": 0.2,
        "logit_scale": 1.5,
        "margin": 0.5,
        "z_loss": 0.02,
        "tau": 1.3,
        "label_offset": 5,
        "ignore_index": 3,
    },
}


def wide(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)


def problem(rng, rows: int, classes: int, dtype: str = "float32", form: RowLossForm | None = None):
    """Logits about 4 wide with a few exact ones and zeros, labels, a third of them ignored."""
    form = form or RowLossForm()
    x = 4 * rng.standard_normal((rows, classes))
    x[rng.random(x.shape) < 0.05] = 1
    x[rng.random(x.shape) < 0.02] = 0
    y = rng.integers(0, classes, rows) + form.label_offset
    y[rng.random(rows) < 0.3] = form.ignore_index
    return x.astype(np_dtype(dtype)), y


def extras(rng, y: np.ndarray, classes: int, form: RowLossForm) -> dict:
    """Weights, a prior that masks a class that is no target, row scales, a mask of valid rows."""
    log_prior = np.log(rng.uniform(0.1, 2, classes))
    unused = np.setdiff1d(np.arange(classes), y - form.label_offset)
    if len(unused) and classes > 1:
        log_prior[unused[0]] = -np.inf
    return {
        "weight": rng.uniform(0.2, 2, classes).astype(np.float32),
        "log_prior": log_prior.astype(np.float32),
        "row_scale": rng.uniform(0.5, 1.5, len(y)).astype(np.float32),
        "valid_mask": (y != form.ignore_index) & (rng.random(len(y)) < 0.9),
    }


# ---- by hand -----------------------------------------------------------------------------------

X = [[2.0, 0, -1, -3]]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_row_by_hand(variant, dtype):
    # s = [3, 1, 1/2, 1/4], S = 19/4
    x = np.array(X, dtype)
    rtol = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-3}[dtype]
    for y, want, slope in (
        (0, math.log(19 / 12), [-7 / 57, 4 / 19, 1 / 19, 1 / 76]),
        (3, math.log(19), [4 / 19, 4 / 19, 1 / 19, -18 / 76]),
    ):
        loss, grad = row_loss_gradient(x, np.array([y]), variant=variant)
        assert loss.dtype == ("float64" if dtype == "float64" else "float32")
        assert grad.dtype == dtype
        np.testing.assert_allclose(loss, [want], rtol=min(rtol, 1e-6))
        np.testing.assert_allclose(wide(grad), [slope], rtol=rtol)
        alone, stats = row_loss(x, np.array([y]), variant=variant)
        assert alone.tobytes() == loss.tobytes()
        np.testing.assert_allclose(wide(stats.rest + stats.own), [4.75], rtol=1e-6)
        again = row_loss_backward(x, np.array([y]), stats, variant=variant)
        np.testing.assert_allclose(wide(again), [slope], rtol=rtol)


@pytest.mark.parametrize("variant", VARIANTS)
def test_smoothing_by_hand(variant):
    form = RowLossForm(label_smoothing=0.1)
    loss, grad = row_loss_gradient(np.float32(X), np.array([0]), form, variant=variant)
    np.testing.assert_allclose(loss, [0.593914289570544], rtol=1e-6)
    want = [[-0.09780702, 0.18552632, 0.04013158, 0.00690789]]
    np.testing.assert_allclose(grad, want, rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_ten_thousand(variant):
    x = np.float32([[1e4, 0, -1e4]] * 2)
    loss, grad = row_loss_gradient(x, np.array([0, 2]), variant=variant)
    np.testing.assert_allclose(loss, [9.99949993336083e-5, 18.4209807289524], rtol=5e-7)
    np.testing.assert_allclose(grad[0, 0], -9.99800020001e-9, rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("z", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("classes", [10, 12, 1000])
def test_a_certain_row_keeps_its_digits(classes, z, variant):
    x = np.full((1, classes), -z, np.float32)
    x[0, 0] = z
    loss, grad = row_loss_gradient(x, np.array([0]), variant=variant)
    ratio = (classes - 1) / (1 + z) ** 2
    np.testing.assert_allclose(loss, [math.log1p(ratio)], rtol=5e-7)
    np.testing.assert_allclose(grad[0, 0], -ratio / (1 + ratio) / (1 + z), rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_softmax_keeps_its_digits_until_exp_underflows(variant):
    form = RowLossForm("softmax")
    for gap in (20.0, 40.0, 80.0):
        x = np.float32([[gap, 0, 0]])
        loss, grad = row_loss_gradient(x, np.array([0]), form, variant=variant)
        np.testing.assert_allclose(loss, [2 * math.exp(-gap)], rtol=2e-6)
        np.testing.assert_allclose(grad, [[-2 * math.exp(-gap), *[math.exp(-gap)] * 2]], rtol=6e-6)
    for gap in (100.0, 200.0, 3e4):  # of a wrong row nothing is lost, and nothing is infinite
        loss, grad = row_loss_gradient(np.float32([[gap, 0]]), np.array([1]), form, variant=variant)
        np.testing.assert_allclose(loss, [gap], rtol=1e-7)
        np.testing.assert_allclose(grad, [[1, -1]], rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_users_example(variant):
    x = np.float32([[2, 0, -1, -3], [0, 0, 0, 0], [1, -1, 5, 0.5]])
    loss, grad = row_loss_gradient(x, np.int32([0, -100, 2]), variant=variant)
    np.testing.assert_allclose(loss, [0.45953232937844, 0, 0.510825623765991], rtol=5e-7)
    assert (grad[1] == 0).all()


# ---- the reference against autograd --------------------------------------------------------------


def eager(x, target, form, weight=None, log_prior=None, row_scale=None, valid_mask=None):
    """The same loss in torch's operators, float64, by logsumexp."""
    import torch

    n, classes = x.shape
    hard = not target.is_floating_point()
    t = form.logit_scale * (1 if row_scale is None else torch.as_tensor(wide(row_scale))[:, None])
    w = torch.ones(classes, dtype=x.dtype) if weight is None else torch.as_tensor(wide(weight))
    prior = (
        torch.zeros(classes, dtype=x.dtype)
        if log_prior is None
        else torch.as_tensor(wide(log_prior))
    )
    keep = torch.ones(n, dtype=torch.bool)
    if hard:
        keep = target != form.ignore_index
    if valid_mask is not None:
        keep = torch.as_tensor(valid_mask)
    z = t * x
    own = torch.zeros_like(x)
    if hard:
        k = torch.where(keep, target - form.label_offset, 0)
        own = torch.nn.functional.one_hot(k, classes).to(x.dtype)
        z = z + form.margin * (1 - own)
    log_f = {
        "softmax": z,
        "stablemax": torch.where(
            z >= 0, torch.log1p(z.clamp(min=0)), -torch.log1p((-z).clamp(min=0))
        ),
        "taylor": torch.log(1 + z + z * z / 2),
    }[form.map]
    g = log_f + prior
    log_sum = torch.logsumexp(g, 1)
    eps = form.label_smoothing
    present = prior > -torch.inf
    spread = eps * present.to(x.dtype) / present.sum()
    distance = torch.where(present, log_sum[:, None] - g, 0)
    loss = form.z_loss * log_sum**2
    if hard:
        plain = (distance * own).sum(1)
        member = plain if form.tau == 1 else torch.expm1((1 - form.tau) * plain) / (1 - form.tau)
        loss = loss + (1 - eps) * (own * w).sum(1) * member + (distance * w * spread).sum(1)
    else:
        loss = loss + (distance * w * ((1 - eps) * target + spread)).sum(1)
    return torch.where(keep, loss, 0)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", MAPS)
def test_reference_is_the_formula_and_its_derivative(kind, name, rng):
    import torch

    form = RowLossForm(kind, **FORMS[name])
    for soft in (False, True):
        if soft and (form.tau != 1 or form.margin):
            continue
        x, y = problem(rng, 9, 6, "float64", form)
        options = extras(rng, y, 6, form)
        target = y
        if soft:
            target = rng.dirichlet(np.ones(6), 9) * np.isfinite(options["log_prior"])
        for given in ({}, options):
            if soft and not given:
                target = rng.dirichlet(np.ones(6), 9)
            elif soft:
                target = target * np.isfinite(options["log_prior"])
            leaf = torch.from_numpy(x).requires_grad_()
            want = eager(leaf, torch.from_numpy(target), form, **given)
            upstream = rng.standard_normal(9)
            (slope,) = torch.autograd.grad(want, leaf, torch.from_numpy(upstream))
            loss, grad = row_loss_gradient(
                x, target, form, upstream=upstream, variant="reference", **given
            )
            np.testing.assert_allclose(loss, want.detach(), rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(grad, slope, rtol=1e-10, atol=1e-13)
            alone, stats = row_loss(x, target, form, variant="reference", **given)
            assert alone.tobytes() == loss.tobytes()
            again = row_loss_backward(
                x, target, stats, form, upstream=upstream, variant="reference", **given
            )
            np.testing.assert_allclose(again, grad, rtol=1e-12, atol=1e-16)


# ---- variants against the reference --------------------------------------------------------------


def check(x, y, form: RowLossForm, dtype: str, variant: str, **options) -> None:
    """Loss, stats and both ways to the gradient within the promised errors."""
    want, slope = row_loss_gradient(x, y, form, variant="reference", **options)
    want64, slope64 = row_loss_gradient(
        wide(x), wide(y) if y.ndim == x.ndim else y, form, variant="reference", **options
    )
    unit = 2.0**-26 if dtype == "float64" else 1.0
    # exp turns the rounding of its argument, up to some 30 here, into a relative error
    tolerance = unit * (3e-6 if form.map == "softmax" else 1e-6)
    plain = form.label_smoothing == 0 and form.z_loss == 0 and y.ndim == 1
    # with more terms than two an entry can be the small difference of large ones
    terms = 1e-30 if plain and form.map != "taylor" else 2.0
    bound = tolerance * (np.abs(slope64) + terms) + EPS[dtype] / 2 * np.abs(slope64)
    bound += {"float16": 2.0**-25, "bfloat16": 1e-40}.get(dtype, 1e-40)
    loss, grad = row_loss_gradient(x, y, form, variant=variant, **options)
    assert loss.dtype == want.dtype and grad.dtype == slope.dtype and grad.shape == x.shape
    np.testing.assert_allclose(loss, want64, rtol=tolerance, atol=tolerance * terms)
    assert (np.abs(wide(grad) - slope64) <= bound).all(), np.abs(wide(grad) - slope64).max()
    alone, stats = row_loss(x, y, form, variant=variant, **options)
    np.testing.assert_allclose(alone, want64, rtol=tolerance, atol=tolerance * terms)
    back = row_loss_backward(x, y, stats, form, variant=variant, **options)
    assert (np.abs(wide(back) - slope64) <= bound).all(), np.abs(wide(back) - slope64).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("variant", FAST)
def test_sizes_and_dtypes(variant, kind, dtype, rng):
    form = RowLossForm(kind)
    for classes in CLASSES:
        for rows in (1, 7, 33) if classes < 1000 else (3,):
            x, y = problem(rng, rows, classes, dtype)
            check(x, y, form, dtype, variant)
            check(x, y.astype(np.int32), form, dtype, variant)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("variant", FAST)
def test_forms(variant, kind, name, rng):
    form = RowLossForm(kind, **FORMS[name])
    for classes in (1, 3, 12, 65, 700):
        x, y = problem(rng, 37, classes, "float32", form)
        check(x, y, form, "float32", variant)
        options = extras(rng, y, classes, form)
        check(x, y, form, "float32", variant, **options)
        for option, value in options.items():
            check(x, y, form, "float32", variant, **{option: value})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("variant", FAST)
def test_soft_targets(variant, kind, dtype, rng):
    for form in (RowLossForm(kind), RowLossForm(kind, label_smoothing=0.1, z_loss=0.01)):
        for classes in (1, 5, 64, 300):
            x, y = problem(rng, 19, classes, dtype)
            q = rng.dirichlet(np.ones(classes), 19).astype(x.dtype)
            check(x, q, form, dtype, variant)
            options = {**extras(rng, y, classes, form), "log_prior": None}
            check(x, q, form, dtype, variant, **options)


@pytest.mark.parametrize("variant", FAST)
@pytest.mark.parametrize("kind", MAPS)
def test_upstream_and_scale_are_factors(kind, variant, rng):
    x, y = problem(rng, 41, 20)
    form = RowLossForm(kind)
    upstream = rng.standard_normal(41).astype(np.float32)
    _, plain = row_loss_gradient(x, y, form, variant=variant)
    loss, grad = row_loss_gradient(x, y, form, upstream=upstream, scale=0.25, variant=variant)
    np.testing.assert_allclose(grad, 0.25 * upstream[:, None] * plain, rtol=1e-6)
    _, stats = row_loss(x, y, form, variant=variant)
    back = row_loss_backward(x, y, stats, form, upstream=upstream, scale=0.25, variant=variant)
    np.testing.assert_allclose(back, grad, rtol=1e-6)
    np.testing.assert_array_equal(loss, row_loss(x, y, form, variant=variant)[0])


# ---- what holds for the functions ----------------------------------------------------------------


@pytest.mark.parametrize("variant", FAST)
def test_laws_of_stablemax(variant, rng):
    x, y = problem(rng, 50, 30)
    loss, grad = row_loss_gradient(x, y, variant=variant)
    weighted = wide(grad) * (1 + np.abs(wide(x)))
    np.testing.assert_allclose(weighted.sum(1), 0, atol=1e-6)
    others = np.arange(30) != y[:, None]
    for row, slope, off in zip(x, grad, others, strict=True):
        assert len(set(slope[off & (row >= 0)].tolist())) <= 1  # bit for bit the same
    order = rng.permutation(30)
    where = np.argsort(order)
    moved = np.where(y == -100, -100, where[np.clip(y, 0, 29)])
    again, _ = row_loss_gradient(x[:, order], moved, variant=variant)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    symlog = np.sign(wide(x)) * np.log1p(np.abs(wide(x)))
    same, _ = row_loss(symlog, y, RowLossForm("softmax"), variant=variant)
    np.testing.assert_allclose(loss, same, rtol=1e-6)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("variant", FAST)
def test_shards_of_a_vocabulary_merge_by_addition(variant, kind, rng):
    x, y = problem(rng, 40, 90)
    want, slope = row_loss_gradient(x, y, RowLossForm(kind), variant=variant)
    parts, cuts = [], (0, 13, 80, 90)
    for first, last in itertools.pairwise(cuts):
        form = RowLossForm(kind, label_offset=first, shard=True)
        part = np.ascontiguousarray(x[:, first:last])
        loss, stats = row_loss(part, y, form, variant=variant)
        assert loss is None
        parts.append((form, part, stats))
    shift, scales = None, [1.0] * 3
    if kind == "softmax":
        shift = np.max([stats.shift for *_, stats in parts], axis=0)
        scales = [np.exp(stats.shift - shift) for *_, stats in parts]
    rest = sum(s * stats.rest for s, (*_, stats) in zip(scales, parts, strict=True))
    own = sum(s * stats.own for s, (*_, stats) in zip(scales, parts, strict=True))
    kept = y != -100
    np.testing.assert_allclose(np.log1p(rest[kept] / own[kept]), want[kept], rtol=2e-6)
    merged = RowStats(rest, own, shift)
    grads = [row_loss_backward(p, y, merged, form, variant=variant) for form, p, _ in parts]
    np.testing.assert_allclose(np.concatenate(grads, axis=1), slope, rtol=3e-6, atol=1e-12)


def test_targets_are_counted():
    y = np.array([[0, 2, -100], [1, -100, 2]])
    assert row_targets(y, 3) == (4, 4.0)
    count, total = row_targets(y, 3, weight=[1.0, 10, 100])
    assert count == 4 and total == pytest.approx(211)
    assert row_targets(y, 3, RowLossForm(ignore_index=2), valid_mask=y == 1)[0] == 1
    assert row_targets(np.zeros(0, np.int64), 3) == (0, 0.0)
    assert row_targets(np.zeros(1 << 20, np.int32), 1 << 20)[0] == 1 << 20  # no array of 4 TiB
