"""Row losses on a CUDA device: the comparisons of test_rowloss_triton, large shapes, no waiting."""

from __future__ import annotations

import numpy as np
import pytest

from flcore import _variants
from flcore.ops.rowloss import RowLossForm, row_loss, row_loss_backward, row_loss_gradient

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import rowloss_checks as checks
from rowloss_checks import MAPS, OPTIONS, close, compare

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
# both sides of every limit: a row a thread, several rows, a row a program, parts
CLASSES = (1, 12, 16, 17, 64, 65, 1000, 8193, 32768, 40_000)


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("map", MAPS)
def test_numbers_of_classes(map, classes, rng):
    for dtype in ("float32", "bfloat16"):
        name = "plain" if classes < 3 else "smooth, all"
        compare(rng, DEVICE, 37 if classes < 5000 else 3, classes, dtype, map, "plain")
        compare(rng, DEVICE, 5, classes, dtype, map, name)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("map", MAPS)
def test_options(map, name, rng):
    for classes in (12, 200, 40_000):
        compare(rng, DEVICE, 4, classes, "float32", map, name)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("map", MAPS)
def test_dtypes(map, dtype, rng):
    for classes in (12, 500, 17_000):
        for name in ("plain", "smooth, all", "soft, all"):
            compare(rng, DEVICE, 4, classes, dtype, map, name)


def test_layouts(rng):
    checks.check_layouts(rng, DEVICE)


def test_saturated_rows():
    checks.check_saturated_rows(DEVICE)


def test_special_values():
    checks.check_special_values(DEVICE)


@pytest.mark.parametrize("classes", [9, 300, 40_000])
def test_arguments_on_the_device(classes, rng):
    checks.check_device_arguments(rng, DEVICE, classes)


def test_shards(rng):
    checks.check_shards(rng, DEVICE)
    checks.check_shards(rng, DEVICE, 80_000, 39_999)


def test_elementary_functions(rng):
    checks.check_elementary_functions(rng, DEVICE)


# ---- size --------------------------------------------------------------------------------------


def closed_form(x, y, rows):
    """Loss and gradient of StableMax for some rows, in float64 on the device."""
    z, k = x[rows].double(), y[rows]
    a = 1 + z.abs()
    s = torch.where(z >= 0, a, 1 / a)
    own = s.gather(1, k[:, None])
    rest = (s.scatter(1, k[:, None], 0)).sum(1, keepdim=True)
    grad = torch.where(z >= 0, 1.0, a**-2) / (rest + own)
    target = -(rest / (rest + own)) / a.gather(1, k[:, None])
    return torch.log1p(rest / own)[:, 0], grad.scatter(1, k[:, None], target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "classes"), [(4096, 32_000), (1024, 128_256), (524_288, 12), (3, 3_000_000)]
)
def test_shapes_of_language_models(rows, classes, dtype):
    generator = torch.Generator(DEVICE).manual_seed(1)
    x = (torch.randn(rows, classes, device=DEVICE, generator=generator) * 4).to(dtype)
    y = torch.randint(0, classes, (rows,), device=DEVICE, generator=generator)
    some = torch.linspace(0, rows - 1, min(rows, 64), device=DEVICE).long()
    want, want_grad = closed_form(x, y, some)
    loss, grad = row_loss_gradient(x, y)
    close(loss[some], want, "float32")
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    close(grad[some], want_grad, name, rounded=True)
    again, stats = row_loss(x, y)
    assert torch.equal(loss, again), "sums are formed in one order"
    close(row_loss_backward(x, y, stats)[some], want_grad, name, rounded=True)
    softmax = RowLossForm("softmax")
    want = torch.nn.functional.cross_entropy(x[some].double(), y[some], reduction="none")
    loss, grad = row_loss_gradient(x, y, softmax)
    close(loss[some], want, "float32")
    assert grad.double().sum(1).abs().max() < 2e-2


def test_rows_beyond_32_bits():
    rows, classes = (1 << 31) // 32_000 + 300, 32_000
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    x = torch.zeros(rows, classes, dtype=torch.bfloat16, device=DEVICE)
    x[-2:].normal_()
    y = torch.full((rows,), 7, device=DEVICE)
    last = torch.tensor([0, rows - 2, rows - 1], device=DEVICE)
    want, want_grad = closed_form(x, y, last)
    loss, grad = row_loss_gradient(x, y, out=x)
    close(loss[last], want, "float32")
    close(grad[last], want_grad, "bfloat16", rounded=True)
    del x, grad
    torch.cuda.empty_cache()


# ---- streams and graphs ------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [12, 1000, 40_000])
def test_nothing_waits_for_the_device(classes):
    x = torch.randn(64, classes, device=DEVICE)
    y = torch.randint(0, classes, (64,), device=DEVICE)
    weight = torch.rand(classes, device=DEVICE)
    form = RowLossForm(label_smoothing=0.1)
    scale = torch.tensor([0.5], device=DEVICE)
    row_loss_gradient(x, y, form, weight=weight, scale=scale)  # compiles
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    pending = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        row_loss_gradient(x, y, form, weight=weight, scale=scale)
        pending.record()
        assert not pending.query(), "the call returned after the stream had drained"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@pytest.mark.parametrize("classes", [12, 40_000])
def test_captured_graph_replays_with_new_inputs(classes):
    x = torch.randn(8, classes, device=DEVICE)
    y = torch.randint(0, classes, (8,), device=DEVICE)
    out = torch.empty_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        row_loss_gradient(x, y, out=out)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = row_loss_gradient(x, y, out=out)
    x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    want, want_grad = closed_form(x, y, slice(None))
    close(loss, want, "float32")
    close(out, want_grad, "float32")


def test_default_is_the_triton_variant():
    chosen = _variants.choose("rowloss", DEVICE)
    assert chosen is not None and not _variants.available("rowloss", DEVICE)["triton"]
    x = torch.tensor([[2.0, 0, -1, -3]], device=DEVICE)
    loss, _ = row_loss(x, torch.tensor([0], device=DEVICE))
    np.testing.assert_allclose(loss.item(), 0.45953232937844, rtol=1e-6)
