"""Losses on a GPU: values and gradients of the CPU, and never a wait for the device."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from flcore.integrations import hrm
from flcore.losses import cross_entropy, stablemax_cross_entropy, taylor_cross_entropy

pytestmark = pytest.mark.gpu
LOSSES = (stablemax_cross_entropy, cross_entropy, taylor_cross_entropy)


class Forbidden:
    """Within it, whatever waits for the device raises."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


def away(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_values_of_the_cpu_without_waiting(loss, reduction, dtype):
    torch.manual_seed(0)
    for shape in ((70, 12), (40, 1000), (3, 40_000), (5, 9, 33)):
        x = (3 * torch.randn(shape)).to(dtype)
        rows = (shape[0], *shape[2:])
        y = torch.where(torch.rand(rows) < 0.2, -100, torch.randint(0, shape[1], rows))
        w, q = torch.rand(shape[1]), torch.randn(shape).softmax(1)
        for target, options in (
            (y, {}),
            (y, {"weight": w, "label_smoothing": 0.1, "z_loss": 0.01}),
            (y.int(), {"valid_mask": y > 0}),
            (q, {"weight": w}),
        ):
            near = x.clone().requires_grad_()
            want = loss(near, target, reduction=reduction, **options)
            upstream = torch.rand_like(want)
            (slope,) = torch.autograd.grad(want, near, upstream)
            there, given = x.cuda().requires_grad_(), {k: away(v) for k, v in options.items()}
            labels, factor = target.cuda(), upstream.cuda()
            with Forbidden():
                got = loss(there, labels, reduction=reduction, **given)
                (grad,) = torch.autograd.grad(got, there, factor)
            assert grad.dtype == dtype and grad.stride() == slope.stride()
            torch.testing.assert_close(got.cpu(), want, rtol=3e-6, atol=1e-6)
            tolerance = {"rtol": 3e-6, "atol": 1e-7} if dtype == torch.float32 else {}
            torch.testing.assert_close(grad.cpu(), slope, **tolerance)


def test_compiled_and_in_place():
    x = torch.randn(64, 500, device="cuda", requires_grad=True)
    y = torch.arange(64, device="cuda")
    with Forbidden():
        want = torch.autograd.grad(stablemax_cross_entropy(x, y), x)[0]
        logits = x * 1
        stablemax_cross_entropy(logits, y, inplace_backward=True).backward()
    torch.testing.assert_close(x.grad, want)
    torch.testing.assert_close(logits.detach(), want)
    compiled = torch.compile(stablemax_cross_entropy, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, y), x)[0], want)


def test_labels_out_of_range_give_nan():
    x = torch.randn(4, 8, device="cuda")
    loss = stablemax_cross_entropy(x, torch.tensor([0, 8, -1, 7]).cuda(), reduction="none")
    assert torch.isnan(loss).tolist() == [False, True, True, False]


def test_hrm_slices():
    whole = torch.randn(8, 90, 11).bfloat16()
    y = torch.randint(0, 11, (8, 81), dtype=torch.int32)
    want = hrm.stablemax_cross_entropy(whole[:, 9:], y)
    got = hrm.stablemax_cross_entropy(whole.cuda()[:, 9:], y.cuda())
    torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=0)
