"""Losses of a linear layer against whole logits: values, gradients, memory, compilation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from flcore.errors import DTypeError, InvalidInputError, LabelError
from flcore.losses import (
    _linear_chunks,
    linear_cross_entropy,
    stablemax_cross_entropy,
    stablemax_linear_cross_entropy,
)
from linear_problem import CLASSES, PAIRS, ROUNDING, WIDTH, close, problem, whole


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20240229)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the products are tiny: threads would wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("loss", "reference"), PAIRS)
def test_equals_whole_logits(loss, reference, bias, reduction, dtype):
    *tensors, y = problem(dtype=dtype, bias=bias)
    options = {
        "reduction": reduction,
        "weight": torch.rand(CLASSES),
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "logit_scale": 0.8,
    }
    got = loss(*tensors[:2], y, linear_bias=tensors[2], chunk_rows=17, **options)
    upstream = torch.randn_like(got)
    want, slopes = whole(reference, tensors, y, upstream, **options)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(got, want, 1e-14 if dtype == torch.float64 else 1e-6)
    given = [t for t in tensors if t is not None]
    for grad, slope in zip(torch.autograd.grad(got, given, upstream), slopes, strict=True):
        assert grad.dtype == dtype
        close(grad, slope, ROUNDING[dtype])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("loss", "reference"), PAIRS)
def test_probabilities_masks_and_priors(loss, reference, reduction):
    *tensors, y = problem(ignored=False)
    mask = torch.rand(y.shape) < 0.6
    prior = torch.rand(CLASSES)
    key = {"prior": prior} if loss is stablemax_linear_cross_entropy else {"log_prior": prior.log()}
    q = torch.softmax(torch.randn(*y.shape, CLASSES), -1)
    for target in (y, y.int(), q, q.double()):
        options = {"reduction": reduction, "valid_mask": mask, **key}
        got = loss(*tensors[:2], target, linear_bias=tensors[2], chunk_rows=20, **options)
        want, slopes = whole(reference, tensors, target, **options)
        close(got, want, 2e-6)
        grads = torch.autograd.grad(got, tensors, torch.ones_like(got))
        for grad, slope in zip(grads, slopes, strict=True):
            close(grad, slope, 2e-6)


def test_value_of_torch():
    h, w, b, y = problem(rows=(60,))
    for reduction in ("mean", "sum", "none"):
        options = {"linear_bias": b, "reduction": reduction, "weight": torch.rand(CLASSES)}
        got = linear_cross_entropy(h, w, y, ignore_index=None, **options)
        if hasattr(F, "linear_cross_entropy"):
            torch.testing.assert_close(got, F.linear_cross_entropy(h, w, y, **options))
        del options["linear_bias"]
        torch.testing.assert_close(got, F.cross_entropy(F.linear(h, w, b), y, **options))
    one = linear_cross_entropy(h[0], w, torch.tensor(3), linear_bias=b)
    torch.testing.assert_close(one, F.cross_entropy(F.linear(h[0], w, b), torch.tensor(3)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_and_no_rows_that_count(reduction):
    for rows in ((0,), (4, 0), (5,)):
        h, w, b, y = problem(rows=rows)
        loss = stablemax_linear_cross_entropy(
            h, w, torch.full_like(y, -100), linear_bias=b, reduction=reduction
        )
        assert loss.shape == (rows if reduction == "none" else ())
        if reduction == "mean":
            assert torch.isnan(loss)
        else:
            assert not loss.any()
        for t in torch.autograd.grad(loss.sum(), (h, w, b)):
            assert not t.any()


def test_ignored_rows_are_not_read():
    h, w, b, y = problem(rows=(90,))
    with torch.no_grad():
        h[y == -100] = torch.nan
        h[(y == -100).nonzero()[0]] = torch.inf
    loss = stablemax_linear_cross_entropy(h, w, y, linear_bias=b, chunk_rows=16)
    grads = torch.autograd.grad(loss, (h, w, b))
    kept = h.detach()[y != -100].requires_grad_()
    want = stablemax_linear_cross_entropy(kept, w, y[y != -100], linear_bias=b, chunk_rows=16)
    slopes = torch.autograd.grad(want, (kept, w, b))
    assert torch.equal(loss, want) and not grads[0][y == -100].any()
    assert torch.equal(grads[0][y != -100], slopes[0])
    assert torch.equal(grads[1], slopes[1]) and torch.equal(grads[2], slopes[2])
    with torch.no_grad():
        h[(y != -100).nonzero()[0]] = torch.nan
    assert torch.isnan(stablemax_linear_cross_entropy(h, w, y))


def test_small_gradients_are_not_left_out():
    # every p but the target's is about 1 / V < 2^-12, most of a filter's tiles would go
    classes = 8192
    h, w = torch.randn(16, 8), torch.randn(classes, 8) / 4
    y = torch.randint(0, classes, (16,))
    w.requires_grad_()
    (grad,) = torch.autograd.grad(stablemax_linear_cross_entropy(h, w, y, reduction="sum"), w)
    wide = w.detach().double().requires_grad_()
    z = h.double() @ wide.T
    (want,) = torch.autograd.grad(stablemax_cross_entropy(z, y, reduction="sum"), wide)
    p = torch.where(z < 0, 1 / (1 - z), 1 + z)
    assert ((p / p.sum(1, keepdim=True)) < 2.0**-12).double().mean() > 0.5
    others = torch.ones(classes, dtype=torch.bool).index_fill(0, y, False)
    close(grad[others], want[others], 2e-6)
    assert grad[others].any(1).all()


# ---- what is computed ----------------------------------------------------------------------------


def products(monkeypatch):
    """Count products by what they are for."""
    seen = {"logits": 0, "classifier": 0, "input": 0}
    chunks, add, add_input = (
        _linear_chunks.LinearRows._chunks,
        torch.addmm,
        _linear_chunks._Gradients._add_input,
    )

    def count_chunks(self):
        for chunk in chunks(self):
            seen["logits"] += 1
            yield chunk

    def count_add(into, *args, **options):
        seen["classifier"] += into.shape[0] == CLASSES
        return add(into, *args, **options)

    def count_input(self, *args):
        seen["input"] += 1
        return add_input(self, *args)

    monkeypatch.setattr(_linear_chunks.LinearRows, "_chunks", count_chunks)
    monkeypatch.setattr(_linear_chunks._Gradients, "_add_input", count_input)
    monkeypatch.setattr(torch, "addmm", count_add)
    return seen


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_wanted_is_computed(monkeypatch, reduction):
    h, w, b, y = problem(rows=(50,), ignored=False)
    forward = 2 if reduction == "none" else 1  # times that the logits are formed
    seen = products(monkeypatch)
    for needed, times in (((1, 1, 1), forward), ((1, 0, 0), forward), ((0, 1, 0), forward)):
        tensors = [
            t.detach().requires_grad_(bool(n)) for t, n in zip((h, w, b), needed, strict=True)
        ]
        seen.update(dict.fromkeys(seen, 0))
        loss = stablemax_linear_cross_entropy(
            *tensors[:2], y, linear_bias=tensors[2], reduction=reduction, chunk_rows=10
        )
        loss.sum().backward()
        assert seen == {"logits": 5 * times, "classifier": 5 * needed[1], "input": 5 * needed[0]}
        assert [t.grad is not None for t in tensors] == [bool(n) for n in needed]
    seen.update(dict.fromkeys(seen, 0))
    with torch.no_grad():
        value = stablemax_linear_cross_entropy(h, w, y, reduction=reduction, chunk_rows=10)
    assert not value.requires_grad and seen == {"logits": 5, "classifier": 0, "input": 0}


def test_chunks_are_a_twentieth_of_the_rows():
    rule = _linear_chunks.rows_per_chunk
    assert rule(4096, 32000, 4, "cpu") == 200
    for rows in (0, 1, 7, 64, 300, 4096, 100_003, 10**7):
        for classes in (1, 50, 32_000, 10**6):
            for device, least, most in (("cpu", 64, 1024), ("cuda", 512, 8192)):
                step = rule(rows, classes, 4, device)
                free = _linear_chunks.LEAST_BYTES[device] // (4 * classes)
                assert 0 < step <= max(rows // 20, least, free) and step <= max(most, free)
                assert step >= min(rows, least)


def test_memory_is_a_chunk_and_the_gradients(tmp_path):
    # both gradients are results; all else must stay below 8 % of the logits
    rows, width, classes = 2048, 64, 6000
    h = torch.randn(rows, width, requires_grad=True)
    w = torch.randn(classes, width).requires_grad_()
    y = torch.randint(0, classes, (rows,))
    for loss in (stablemax_linear_cross_entropy, linear_cross_entropy):
        for factor in (1, 3):
            h.grad = w.grad = None
            options = {"activities": [torch.profiler.ProfilerActivity.CPU], "profile_memory": True}
            with torch.profiler.profile(**options) as found:
                (factor * loss(h, w, y)).backward()
            path = tmp_path / "trace.json"
            found.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
            sizes = [e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]"]
            assert len(sizes) > 20
            peak = max(sizes) - sizes[0]
            results = h.grad.nbytes + w.grad.nbytes
            assert results < peak < results + 0.08 * 4 * rows * classes


PEAK = """
import sys
import torch
from flcore.losses import stablemax_linear_cross_entropy

def resident(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))

def step(h, w, y):
    stablemax_linear_cross_entropy(h, w, y).backward()

rows, width, classes = (int(n) for n in sys.argv[1:])
h, w = torch.randn(rows, width, requires_grad=True), torch.randn(classes, width, requires_grad=True)
y = torch.randint(0, classes, (rows,))
step(*(torch.randn(99, width, requires_grad=True) for _ in range(2)), torch.arange(99))
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
step(h, w, y)
print((resident("VmHWM") - before - h.grad.nbytes - w.grad.nbytes) / (4 * rows * classes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_resident_memory_at_full_size():
    # all of it, what the products take for themselves too
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "4096", "1024", "32000"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert 0.03 < float(done.stdout) < 0.08


# ---- modules and errors --------------------------------------------------------------------------


def test_modules():
    from flcore import nn

    h, _, _, y = problem(rows=(50,))
    for module, function, key in (
        (nn.StableMaxLinearCrossEntropyLoss, stablemax_linear_cross_entropy, "prior"),
        (nn.LinearCrossEntropyLoss, linear_cross_entropy, "log_prior"),
    ):
        prior = torch.rand(CLASSES)
        loss = module(WIDTH, CLASSES, bias=True, z_loss=0.01, reduction="sum", **{key: prior})
        want = function(
            *(h, loss.linear.weight, y),
            **{"linear_bias": loss.linear.bias, "z_loss": 0.01, "reduction": "sum", key: prior},
        )
        assert torch.equal(loss(h, y), want)
        assert set(loss.state_dict()) == {"linear.weight", "linear.bias", key}
        assert "reduction='sum'" in repr(loss)
        torch.testing.assert_close(loss(h, y.clamp(0), valid_mask=y != -100), want)


def test_bad_input_is_named():
    h, w, b, y = problem(rows=(6,), ignored=False)
    loss = stablemax_linear_cross_entropy
    for error, message, call in (
        (InvalidInputError, "reduction: expected", lambda: loss(h, w, y, reduction="avg")),
        (InvalidInputError, r"target: expected shape \(6,\)", lambda: loss(h, w, y[:2])),
        (InvalidInputError, r"valid_mask: expected", lambda: loss(h, w, y, valid_mask=y[:2] > 0)),
        (InvalidInputError, "linear_weight: expected shape", lambda: loss(h, w[:, :3], y)),
        (InvalidInputError, "linear_weight: expected at least", lambda: loss(h, w[:0], y)),
        (InvalidInputError, "linear_bias: expected", lambda: loss(h, w, y, linear_bias=b[:2])),
        (InvalidInputError, "chunk_rows: expected", lambda: loss(h, w, y, chunk_rows=0)),
        (InvalidInputError, "label_offset: needs", lambda: loss(h, w, y, label_offset=3)),
        (InvalidInputError, "weight: expected shape", lambda: loss(h, w, y, weight=b.detach()[:2])),
        (InvalidInputError, "weight: this loss has", lambda: loss(h, w, y, weight=b)),
        (DTypeError, "linear_weight: expected a torch", lambda: loss(h, np.ones((3, 4)), y)),
        (DTypeError, "input: expected one of", lambda: loss(h.detach().long(), w, y)),
        (DTypeError, "linear_bias: expected", lambda: loss(h, w, y, linear_bias=b.double())),
        (DTypeError, "prior: expected", lambda: loss(h, w, y, prior=[1.0])),
        (IndexError, "row 2 has 99", lambda: loss(h, w, torch.tensor([0, 1, 99, 0, 0, 0]))),
        (LabelError, "prior 0", lambda: loss(h, w, y, prior=torch.zeros(CLASSES))),
    ):
        with pytest.raises(error, match=message):
            call()


# ---- GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("loss", "reference"), PAIRS)
def test_gpu_equals_whole_logits(loss, reference, reduction, dtype):
    *tensors, y = problem(rows=(700,), dtype=dtype)
    weight = torch.rand(CLASSES)
    there = [t.detach().cuda().requires_grad_() for t in tensors]
    with torch.no_grad():
        there[0][(y == -100).nonzero()[0]] = torch.nan
    got = loss(
        *there[:2],
        y.cuda(),
        linear_bias=there[2],
        weight=weight.cuda(),
        reduction=reduction,
        chunk_rows=300,
        label_smoothing=0.1,
    )
    upstream = torch.rand(got.shape)
    want, slopes = whole(
        reference, tensors, y, upstream, weight=weight, reduction=reduction, label_smoothing=0.1
    )
    close(got.cpu(), want, 1e-12 if dtype == torch.float64 else 2e-6)
    grads = torch.autograd.grad(got, there, upstream.cuda())
    # tensor cores round the gradient in the logits
    tolerance = {torch.bfloat16: 2.0**-6, torch.float32: 5e-6}.get(dtype, ROUNDING[dtype])
    for grad, slope in zip(grads, slopes, strict=True):
        close(grad.cpu(), slope, tolerance)


@pytest.mark.gpu
def test_gpu_does_not_wait_for_the_device():
    h, w, b, y = (t.detach().cuda() for t in problem(rows=(700,)))
    h.requires_grad_()
    w.requires_grad_()
    for _ in range(2):
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            (3 * stablemax_linear_cross_entropy(h, w, y, linear_bias=b)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
