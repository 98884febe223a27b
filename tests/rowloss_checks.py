"""What the tests of Triton's row losses compare, on the CPU in its interpreter and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.ops import _rowloss_prepare as prepare
from flcore.ops._rowloss_call import RowLossForm, RowStats
from flcore.ops.rowloss import row_loss, row_loss_backward, row_loss_gradient
from support import EPS

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
import triton.language as tl
from flcore.pykernels import elementary

MAPS = ("stablemax", "softmax", "taylor")
# settings of the form, arrays beside the logits (p: log-prior, q: soft target, v: valid mask)
OPTIONS = {
    "plain": ({}, ""),
    "upstream": ({}, "u"),
    "scaled": ({"logit_scale": 0.7, "margin": -1.5}, "tu"),
    "weights": ({"ignore_index": 2, "label_offset": 1}, "wu"),
    "prior": ({}, "pv"),
    "smooth": ({"label_smoothing": 0.1}, ""),
    "smooth, all": ({"label_smoothing": 0.3, "z_loss": 0.01, "margin": 0.5}, "wptu"),
    "smooth, only": ({"label_smoothing": 1.0}, "w"),
    "z loss": ({"z_loss": 1e-2}, "u"),
    "gce": ({"tau": 1.7}, "wu"),
    "mae": ({"tau": 2.0, "logit_scale": 2.0}, ""),
    "exponential": ({"tau": 0.25}, "u"),
    "soft": ({}, "q"),
    "soft, all": ({"label_smoothing": 0.2, "z_loss": 0.01}, "qwpvtu"),
}


def problem(rng, rows, classes, dtype, form, has, spread=3.0):
    """Logits, target and keywords; of the rows two do not count and hold NaN."""
    x = torch.from_numpy(rng.standard_normal((rows, classes)) * spread).to(getattr(torch, dtype))
    kind = torch.float64 if dtype == "float64" else torch.float32

    def vector(low, high, n):
        return torch.from_numpy(rng.uniform(low, high, n)).to(kind)

    keywords = {}
    for key, name, n in (("w", "weight", classes), ("t", "row_scale", rows)):
        if key in has:
            keywords[name] = vector(0.2, 2, n)
    y = rng.integers(0, classes, rows) + form.label_offset
    if "p" in has:
        keywords["log_prior"] = vector(-3, 0, classes)
        if classes > 2:
            keywords["log_prior"][(y[0] + 1) % classes] = -torch.inf
            y[y - form.label_offset == (y[0] + 1) % classes] = y[0]
    out = [1, rows - 1] if rows > 2 else []
    if "v" in has:
        keywords["valid_mask"] = torch.ones(rows, dtype=torch.bool)
        keywords["valid_mask"][out] = False
    else:
        y[y == form.ignore_index] += 1 if classes > 1 else 0
        y[out] = form.ignore_index
    target = torch.from_numpy(y)
    if "q" in has:
        q = rng.dirichlet(np.ones(classes), rows)
        q[:, 0] = 0
        if "p" in has:
            q[:, torch.isinf(keywords["log_prior"]).numpy()] = 0
        target = torch.from_numpy(q).to(x.dtype)
        if "v" not in has:
            out = []
    x[out] = torch.nan
    upstream = vector(-1, 1, rows) if "u" in has else None
    return x, target, keywords, upstream


def moved(device, x):
    if isinstance(x, dict):
        return {key: moved(device, value) for key, value in x.items()}
    return x.to(device) if isinstance(x, torch.Tensor) else x


def doubles(x):
    return x.detach().cpu().double().numpy()


def close(found, want, dtype, rounded=False, factor=1.0):
    """Within the contract: 1e-6 in float32 (5e-15 in float64) and half an ulp of the dtype."""
    tolerance = factor * (5e-15 if dtype == "float64" else 1e-6)
    if rounded and dtype in ("float16", "bfloat16"):
        tolerance += EPS[dtype] / 2
    found, want = doubles(found), doubles(want)
    finite = want[np.isfinite(want)]
    least = tolerance * 1e-2 * np.abs(finite).max(initial=0) if factor > 1 else 0.0
    if rounded and dtype == "float16":
        least = max(least, 2.0**-25)  # subnormal gradients
    np.testing.assert_allclose(found, want, rtol=tolerance, atol=max(least, 1e-300))


def compare(rng, device, rows, classes, dtype, map, name, **more):
    """One setting through forward, both and backward."""
    settings, has = OPTIONS[name]
    form = RowLossForm(map=map, **settings)
    x, target, keywords, upstream = problem(rng, rows, classes, dtype, form, has, **more)
    there = {"variant": "triton", **moved(device, keywords)}
    x_there, target_there, upstream_there = (moved(device, v) for v in (x, target, upstream))
    # a rounded t x + margin moves e by |z| ulps, and terms of both signs meet when smoothed
    factor = 1.0 if name in ("plain", "upstream", "weights") else 10.0
    exact = {"variant": "reference", **as64(keywords)}
    want, want_stats = row_loss(x.double(), as64(target), form, **exact)
    found, stats = row_loss(x_there, target_there, form, **there)
    assert found.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    close(found, want, dtype, factor=factor)
    close(stats.rest, want_stats.rest, dtype, factor=10.0)
    close(stats.own, want_stats.own, dtype, factor=10.0)
    want = row_loss_backward(
        x.double(), as64(target), want_stats, form, upstream=as64(upstream), scale=0.3, **exact
    )
    options = {"upstream": upstream_there, "scale": 0.3, **there}
    both, grad = row_loss_gradient(x_there, target_there, form, **options)
    assert grad.dtype == x.dtype
    close(both, found.cpu(), dtype, factor=factor)
    close(grad, want, dtype, rounded=True, factor=factor)
    grad = row_loss_backward(x_there, target_there, stats, form, **options)
    close(grad, want, dtype, rounded=True, factor=factor)
    in_place = x_there.clone()
    row_loss_gradient(in_place, target_there, form, out=in_place, **options)
    close(in_place, want, dtype, rounded=True, factor=factor)


def as64(x):
    if isinstance(x, dict):
        return {key: as64(value) for key, value in x.items()}
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def layouts(rng, device, dtype="float32"):
    """Rows at two distances, rows of an unusual distance, the class dimension in the middle."""
    base = torch.from_numpy(rng.standard_normal((3, 5, 14))).to(getattr(torch, dtype)).to(device)
    y = torch.from_numpy(rng.integers(0, 14, (3, 5))).to(device)
    y[0, 1] = -100
    image = torch.from_numpy(rng.standard_normal((2, 7, 5, 3))).to(getattr(torch, dtype)).to(device)
    pixels = torch.from_numpy(rng.integers(0, 7, (2, 5, 3))).to(device)
    one = torch.from_numpy(rng.standard_normal(8)).to(getattr(torch, dtype)).to(device)
    yield base[:, 2:, 1:13], (y % 12)[:, 2:].contiguous(), -1
    yield base[:, :, 3:].transpose(0, 1), (y % 11).t().contiguous(), -1
    yield base[0, ::2, ::3], y[0, ::2].to(torch.int32) % 5, -1
    yield image, pixels, 1
    yield image[:, 1:6], pixels % 5, 1
    yield image.permute(0, 2, 3, 1), pixels, 3
    yield one[:1].expand(5, 1), y[0, :5] * 0, 1
    yield one, torch.tensor(3, device=device), 0


def check_layouts(rng, device, step=1):
    for x, y, class_dim in list(layouts(rng, device))[::step]:
        for form in (RowLossForm(), RowLossForm("softmax", label_smoothing=0.1)):
            options = {"class_dim": class_dim, "variant": "reference"}
            want, want_stats = row_loss(x.cpu().double(), y.cpu(), form, **options)
            want_grad = row_loss_backward(x.cpu().double(), y.cpu(), want_stats, form, **options)
            options["variant"] = "triton"
            loss, stats = row_loss(x, y, form, **options)
            close(loss, want, "float32", factor=10)
            outs = [None, torch.empty_like(x, memory_format=torch.contiguous_format)]
            if 0 not in x.stride():
                outs.append(torch.empty(x.numel() * 2, device=device).as_strided(
                    x.shape, tuple(2 * s for s in outs[1].stride()), 1))  # fmt: skip
            for out in outs:
                _, grad = row_loss_gradient(x, y, form, out=out, **options)
                close(grad, want_grad, "float32", factor=10)
            grad = row_loss_backward(x, y, stats, form, out=outs[-1], **options)
            close(grad, want_grad, "float32", factor=10)


def check_saturated_rows(device):
    """Relative error 1e-6 where the loss is as small as the logits are large."""
    for classes in (12, 113):
        x = torch.zeros(4, classes, dtype=torch.float64)
        for row, top in enumerate((1e2, 1e4, 1e6, 1e7)):
            x[row] = -top / 2 - torch.arange(classes) * top / 300
            x[row, 5] = top
        y = torch.full((4,), 5)
        x = x.float()
        want, want_grad = row_loss_gradient(x.double(), y, variant="reference")
        loss, grad = row_loss_gradient(x.to(device), y.to(device), variant="triton")
        close(loss, want, "float32")
        close(grad, want_grad, "float32")
        gaps = torch.tensor([20.0, 40, 80.123456, -30, -200, -1e4])
        x = torch.linspace(0, 0.1234567, classes).repeat(6, 1)
        x[:, 5] += gaps
        y, form = torch.full((6,), 5), RowLossForm("softmax")
        want, want_grad = row_loss_gradient(x.double(), y, form, variant="reference")
        loss, grad = row_loss_gradient(x.to(device), y.to(device), form, variant="triton")
        close(loss, want, "float32")
        near = slice(0, 4)  # then e_y is 0 in float32
        close(grad[near], want_grad[near], "float32", factor=2)
        assert torch.isfinite(grad).all()


def check_special_values(device, maps=MAPS):
    inf, nan = torch.inf, torch.nan
    for map in maps:
        form = RowLossForm(map)
        x = torch.tensor([[1.0, 1, -inf, 2], [1, inf, 0, 2], [nan, 1, 0, 0], [1, -inf, 0, 0]])
        y = torch.tensor([0, 0, 1, 1])
        for width in (4, 90):
            x = torch.nn.functional.pad(x, (0, width - 4), value=-1.0)
            loss, stats = row_loss(x.to(device), y.to(device), form, variant="triton")
            both, grad = row_loss_gradient(x.to(device), y.to(device), form, variant="triton")
            back = row_loss_backward(
                x.to(device), y.to(device), stats, form, variant="triton"
            )  # fmt: skip
            want, want_grad = row_loss_gradient(x.double(), y, form, variant="reference")
            close(loss, want, "float32")
            close(both, want, "float32")
            close(grad, want_grad, "float32", factor=10)
            close(back, want_grad, "float32", factor=10)
            assert grad[0, 2] == 0 and torch.isfinite(grad[0]).all()
            assert torch.isnan(loss[1:3]).all() and torch.isnan(grad[1:3]).all()
            assert loss[3] == inf and grad[3, 1] == 0


def check_device_arguments(rng, device, classes):
    """Arguments that stay on the device; labels that are none: NaN, nothing read out of bounds."""
    form = RowLossForm(label_smoothing=0.2, label_offset=3)
    x = torch.from_numpy(rng.standard_normal((5, classes))).float().to(device)
    y = torch.tensor([3, 2, 3 + classes, 2**40, 3 + classes - 1], device=device)
    weight = torch.linspace(0.5, 1, classes, device=device)
    call = prepare.prepare(x, y, form, -1, weight)
    call.weight_sum = call.classes_present = float("nan")
    call.totals = torch.tensor([float(weight.sum()), float(classes)], device=device)
    call.scale_tensor = torch.tensor([0.25], device=device)
    call.loss, call.rest, call.own = torch.full((3, 5), -1.0, device=device)
    call.grad = grad = torch.empty_like(x)
    call.grad_row_stride, call.grad_class_stride = grad.stride()
    from flcore.pykernels.rowloss import rowloss

    rowloss(call, 1)
    good, bad = [0, 4], [1, 2, 3]
    want, want_grad = row_loss_gradient(
        x[good].cpu().double(),
        y[good].cpu(),
        form,
        weight=weight.cpu(),
        scale=0.25,
        variant="reference",
    )
    close(call.loss[good], want, "float32", factor=10)
    close(grad[good], want_grad, "float32", factor=10)
    assert torch.isnan(call.loss[bad]).all() and torch.isnan(grad[bad]).all()
    rowloss(call, 2)
    close(grad[good], want_grad, "float32", factor=10)
    assert torch.isnan(grad[bad]).all()


def check_shards(rng, device, classes=50, cut=17, maps=MAPS):
    """Two shards of a vocabulary, merged by adding, are the whole."""
    for map in maps:
        for tau in (1.0, 1.5):
            x = torch.from_numpy(rng.standard_normal((6, classes)) * 4).float().to(device)
            y = torch.from_numpy(rng.integers(0, classes, 6)).to(device)
            y[2] = -100
            form = RowLossForm(map, tau=tau)
            want = row_loss_gradient(x.cpu().double(), y.cpu(), form, variant="reference")[1]
            halves = [
                (x[:, :cut], RowLossForm(map, tau=tau, shard=True)),
                (x[:, cut:], RowLossForm(map, tau=tau, shard=True, label_offset=cut)),
            ]
            stats = [row_loss(part, y, f, variant="triton")[1] for part, f in halves]
            factors, shift = [1.0, 1.0], None
            if map == "softmax":
                shift = torch.maximum(stats[0].shift, stats[1].shift)
                factors = [torch.exp(s.shift - shift) for s in stats]
            merged = RowStats(
                sum(s.rest * f for s, f in zip(stats, factors, strict=True)),
                sum(s.own * f for s, f in zip(stats, factors, strict=True)),
                shift,
            )
            grads = [row_loss_backward(part, y, merged, f, variant="triton") for part, f in halves]
            close(torch.cat(grads, 1), want, "float32", factor=10)


@triton.jit
def elementary_kernel(x_ptr, y_ptr, n: tl.constexpr, which: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, n))
    if which == 0:
        y = elementary.exp(x)
    elif which == 1:
        y = elementary.expm1(x)
    elif which == 2:
        y = elementary.log1p(x)
    else:
        y = elementary.exp_difference(x, 70.25)
    tl.store(y_ptr + tl.arange(0, n), y)


def check_elementary_functions(rng, device):
    n = 2**16
    small = 10 ** rng.uniform(-20, 0, n // 2) * rng.choice([-1, 1], n // 2)
    arguments = (
        np.concatenate([rng.uniform(-86, 88, n // 2), small]),
        np.concatenate([rng.uniform(-40, 80, n // 2), small]),
        10 ** rng.uniform(-20, 18, n),
        rng.uniform(-10, 70.25, n),
    )
    exact = (np.exp, np.expm1, np.log1p, lambda x: np.exp(x - 70.25))
    for kind, unit in ((torch.float32, 2.0**-24), (torch.float64, 2.0**-53)):
        for which in range(4):
            x = torch.from_numpy(arguments[which]).to(device, kind)
            y = torch.empty_like(x)
            elementary_kernel[(1,)](x, y, n, which)
            want = exact[which](x.cpu().numpy().astype(np.longdouble))
            error = np.abs(y.cpu().numpy() / want - 1).max() / unit
            # NumPy's log takes its ulps; a difference of float64 is rounded once
            assert error < (70 if which == 3 and unit < 1e-10 else 5), (which, unit)
        x = torch.tensor([0, torch.inf, -torch.inf, torch.nan, 800, -800], dtype=kind)
        x = x.to(device)
        with np.errstate(all="ignore"):
            for which in range(2):
                y = torch.empty(4, dtype=kind, device=device)
                for half in (x[:4], x[2:]):
                    elementary_kernel[(1,)](half.contiguous(), y, 4, which)
                    want = exact[which](half.cpu().numpy())
                    np.testing.assert_array_equal(y.cpu().numpy(), want)
