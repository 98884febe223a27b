"""Row losses in Triton against the float64 reference: paths, options, layouts.

The comparisons take a device: tests/test_gpu_losses.py runs them there.
"""

from __future__ import annotations

import numpy as np
import pytest

from flcore import _variants
from flcore.ops._rowloss_call import RowLossForm
from flcore.ops.rowloss import row_loss, row_loss_gradient

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
import rowloss_checks as checks
from rowloss_checks import MAPS, OPTIONS, close, compare

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

needs_interpreter = pytest.mark.skipif(
    bool(_variants.available("rowloss", "cpu")["triton"]), reason="there is a GPU"
)
PATHS = ("whole", "parts")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Rows in one program, or (here of 64 classes) over many: both with few classes."""
    if request.param == "parts":
        from flcore.pykernels import rowloss as kernels

        monkeypatch.setattr(kernels, "THREADS", 0)
        monkeypatch.setattr(kernels, "TINY", 0)
        monkeypatch.setattr(kernels, "PART", 64)
    return request.param


@needs_interpreter
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("map", MAPS)
def test_options_agree_with_the_reference(path, map, name, rng):
    if path == "whole":
        compare(rng, "cpu", 5, 12, "float32", map, name)
    elif MAPS[list(OPTIONS).index(name) % 3] == map:  # slow; the arithmetic is the same
        compare(rng, "cpu", 3, 70, "float32", map, name)


@needs_interpreter
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("map", MAPS)
def test_dtypes_agree_with_the_reference(path, map, dtype, rng):
    names = ("plain", "smooth, all", "soft, all")
    if path == "whole":
        for name in names:
            compare(rng, "cpu", 3, 17, dtype, map, name)
    else:
        compare(rng, "cpu", 2, 66, dtype, map, names[MAPS.index(map)])


@needs_interpreter
@pytest.mark.parametrize("classes", [1, 2, 3, 16, 31, 64, 65, 130, 300])
def test_numbers_of_classes(path, classes, rng):
    for map in MAPS[:2] if path == "whole" else MAPS[:1]:
        compare(rng, "cpu", 2, classes, "float32", map, "smooth" if classes > 2 else "plain")


@needs_interpreter
def test_layouts(path, rng):
    checks.check_layouts(rng, "cpu", 1 if path == "whole" else 6)


@needs_interpreter
def test_nothing_but_the_rows_is_written(path, rng):
    buffer = torch.full((8, 40), 7.0)
    x = torch.from_numpy(rng.standard_normal((6, 21))).float()
    out = buffer[1:7, 3:24]
    y = torch.tensor([0, -100, 20, 3, 4, 5])
    want = row_loss_gradient(x.double(), y, variant="reference")[1]
    row_loss_gradient(x, y, out=out, variant="triton")
    close(out, want, "float32")
    assert (out[1] == 0).all()
    out.fill_(7)
    assert (buffer == 7).all()


@needs_interpreter
def test_empty_inputs():
    for shape in ((0, 5), (0, 70)):
        x, y = torch.empty(shape), torch.empty(0, dtype=torch.int64)
        loss, stats = row_loss(x, y, variant="triton")
        assert loss.shape == stats.rest.shape == (0,)
        assert row_loss_gradient(x, y, variant="triton")[1].shape == shape


@needs_interpreter
def test_worked_numbers(path):
    x = torch.tensor([[2.0, 0, -1, -3], [2, 0, -1, -3], [torch.nan] * 4])
    y = torch.tensor([0, 3, -100])
    loss, grad = row_loss_gradient(x, y, variant="triton")
    assert loss.tolist() == pytest.approx([0.45953232937844, 2.94443897916644, 0], rel=1e-6)
    rows = [
        [-0.122807017544, 0.210526315789, 0.052631578947, 0.013157894737],
        [0.210526315789, 0.210526315789, 0.052631578947, -0.236842105263],
        [0, 0, 0, 0],
    ]
    np.testing.assert_allclose(grad.numpy(), rows, rtol=1e-6)
    assert grad[1, 0] == grad[1, 1]  # the same bits for all logits from 0 on
    loss, grad = row_loss_gradient(
        x[:1], y[:1], RowLossForm(label_smoothing=0.1), variant="triton"
    )  # fmt: skip
    assert loss.item() == pytest.approx(0.593914289570544, rel=1e-6)
    np.testing.assert_allclose(
        grad[0].numpy(), [-0.09780702, 0.18552632, 0.04013158, 0.00690789], rtol=2e-6
    )


@needs_interpreter
def test_saturated_rows(path):
    checks.check_saturated_rows("cpu")


@needs_interpreter
def test_special_values(path):
    checks.check_special_values("cpu", MAPS if path == "whole" else MAPS[:2])


@needs_interpreter
@pytest.mark.parametrize("classes", [9, 80])
def test_arguments_on_the_device(path, classes, rng):
    checks.check_device_arguments(rng, "cpu", classes)


@needs_interpreter
def test_shards(path, rng):
    checks.check_shards(rng, "cpu", maps=MAPS if path == "whole" else MAPS[1:2])


@needs_interpreter
def test_elementary_functions(rng):
    checks.check_elementary_functions(rng, "cpu")
