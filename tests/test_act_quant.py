"""Activations in 8 bits: worked numbers, the kernel against its definition, limits, odd memory."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore import _variants
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops import quantize_activation
from support import DTYPES, HAS_TORCH, np_dtype, outputs_per_level, unaligned

VARIANTS = [v for v, why in _variants.available("act_quant", "cpu").items() if not why]
BOTH = pytest.mark.parametrize("asymmetric", [False, True])


def same(got, want) -> None:
    """All parts, bit for bit."""
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, name
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_asymmetric_by_hand(variant):
    q = quantize_activation(np.float32([[1, -2, 0.5, 3]]), asymmetric=True, variant=variant)
    assert q.codes.tolist() == [[153, 0, 128, 255]] and q.zeros.tolist() == [[102]]
    assert q.sums.tolist() == [[536]] and q.codes.dtype == np.uint8
    assert q.scales[0, 0] == pytest.approx(0.01960784, abs=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_symmetric_by_hand(variant):
    q = quantize_activation(np.float32([[1, -2, 0.5, 3]]), variant=variant)
    assert q.codes.tolist() == [[42, -85, 21, 127]] and q.zeros is None
    assert q.sums.tolist() == [[105]] and q.codes.dtype == np.int8
    assert q.scales[0, 0] == pytest.approx(3 / 127)
    x = np.float32([1, 2, -1, 0.5, 0.25, -0.5, 1, 2])  # blocks of 4: 2 / 127 each
    q = quantize_activation(x, 4, variant=variant)
    # 63.5, 127, -63.5, 31.75 and 15.875, -31.75, 63.5, 127; halves go to even codes
    assert q.codes.tolist() == [64, 127, -64, 32, 16, -32, 64, 127]
    assert q.sums.tolist() == [159, 175]


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_has_the_bits_of_the_definition(dtype, asymmetric, rng):
    for rows, k in ((1, 1), (3, 15), (2, 16), (4, 17), (3, 100), (2, 1037), (1, 4096)):
        x = (rng.standard_normal((rows, k)) * 10.0 ** rng.integers(-3, 4, (rows, 1))).astype(
            np_dtype(dtype)
        )
        for block in (0, 1, 7, 16, 32, k, 5000):
            want = quantize_activation(x, block, asymmetric=asymmetric, variant="reference")
            same(quantize_activation(x, block, asymmetric=asymmetric), want)


@BOTH
def test_values_come_back_within_half_a_scale(asymmetric, rng):
    x = rng.standard_normal((20, 333)).astype(np.float32) + np.float32(0.5)
    q = quantize_activation(x, 48, asymmetric=asymmetric)
    zeros = 0.0 if q.zeros is None else np.repeat(q.zeros.astype(float), 48, 1)[:, :333]
    scales = np.repeat(q.scales.astype(float), 48, 1)[:, :333]
    off = np.abs(scales * (q.codes - zeros) - x) / scales
    assert off.max() <= (1.0 if asymmetric else 0.5) + 1e-4
    ends = [np.add.reduceat(row.astype(np.int64), range(0, 333, 48)) for row in q.codes]
    np.testing.assert_array_equal(q.sums, ends)


@BOTH
@pytest.mark.parametrize("variant", VARIANTS)
def test_extremes(variant, asymmetric):
    big, tiny = np.float32(3.4e38), np.float32(1e-45)
    x = np.zeros((7, 20), np.float32)
    x[1, 3] = np.nan
    x[2, 4] = -np.inf
    x[3, :2] = big, -big
    x[4, :3] = 3e-41, -3e-41, 1e-41
    x[5, 0] = tiny
    x[6, 0] = -0.0
    q = quantize_activation(x, asymmetric=asymmetric, variant=variant)
    zero = 128 if asymmetric else 0
    assert q.scales[0, 0] == 0 and q.scales[6, 0] == 0
    assert np.isnan(q.scales[1:3, 0]).all() and np.isfinite(np.delete(q.scales[:, 0], [1, 2])).all()
    assert not q.codes[:3].any() and not q.sums[:3].any() and not q.codes[6].any()
    one, other = (255, 0) if asymmetric else (127, -127)
    for row in (3, 4):
        assert q.codes[row, 0] == one and q.codes[row, 1] in (other, other + 1)
        assert q.codes[row, 19] == zero
    assert q.codes[4, 2] in ((170, 171) if asymmetric else (42,))
    assert q.codes[5, 0] == one and abs(q.scales[4, 0] * 127 / 3e-41 - 1) < 0.01


def test_infinite_float64_and_rounding_to_float32():
    q = quantize_activation(np.array([[1e300, 1.0]]))
    assert np.isnan(q.scales).all() and not q.codes.any()
    x = np.array([[1 / 3, -2 / 3]])
    same(quantize_activation(x), quantize_activation(x.astype(np.float32)))


def test_shapes_and_memory(rng):
    x = rng.standard_normal((2, 3, 40)).astype(np.float32)
    want = quantize_activation(x.reshape(6, 40), 16)
    got = quantize_activation(x, 16)
    assert got.codes.shape == (2, 3, 40) and got.scales.shape == got.sums.shape == (2, 3, 3)
    assert got.codes.tobytes() == want.codes.tobytes()
    same(quantize_activation(unaligned(x), 16), got)
    x.flags.writeable = False
    same(quantize_activation(x[::-1, :, ::2], 16), quantize_activation(x[::-1, :, ::2].copy(), 16))
    for shape in ((0, 5), (5, 0), (0,)):
        q = quantize_activation(np.ones(shape, np.float32))
        assert q.codes.shape == shape and q.scales.shape == (*shape[:-1], int(shape[-1] > 0))


def test_same_bits_at_every_level_and_thread_count():
    script = """
import hashlib, numpy as np, flcore
from flcore.ops import quantize_activation
rng, digest = np.random.default_rng(1), hashlib.sha256()
for threads in (1, 2, 3):
    flcore.set_num_threads(threads)
    for dtype in (np.float32, np.float16):
        x = (rng.standard_normal((100, 1407)) * 10.0 ** rng.integers(-6, 4, (100, 1))).astype(dtype)
        for asymmetric in (False, True):
            for part in quantize_activation(x, 112, asymmetric=asymmetric):
                digest.update(b"" if part is None else part.tobytes())
print(digest.hexdigest())
"""
    assert len(set(outputs_per_level(script).values())) == 1


def test_threads_do_not_change_a_bit(rng):
    x = rng.standard_normal((300, 1000)).astype(np.float32)
    found = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        q = quantize_activation(x, 64)
        found.add(q.codes.tobytes() + q.scales.tobytes() + q.sums.tobytes())
    flcore.set_num_threads(None)
    assert len(found) == 1


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch(rng):
    import torch

    x = rng.standard_normal((5, 70)).astype(np.float32)
    q = quantize_activation(torch.from_numpy(x), 32, asymmetric=True)
    assert all(isinstance(part, torch.Tensor) for part in q)
    same(type(q)(*(part.numpy() for part in q)), quantize_activation(x, 32, asymmetric=True))
    narrow = torch.from_numpy(x).bfloat16()
    assert torch.equal(quantize_activation(narrow).codes, quantize_activation(narrow.float()).codes)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (np.ones(4, np.int32), {}, DTypeError, "x: expected float64"),
        ([1.0], {}, DTypeError, "x: expected a NumPy array"),
        (np.array(1, np.float32), {}, InvalidInputError, "x: expected at least one dimension"),
        (np.ones(4, np.float32), {"block": -16}, InvalidInputError, "block: expected"),
        (np.ones(4, np.float32), {"block": 1.5}, DTypeError, "block: expected an integer"),
        (np.ones(4, np.float32), {"variant": "abc"}, InvalidInputError, "variant"),
    ],
)
def test_bad_input_is_named(x, options, error, message):
    with pytest.raises(error, match=message):
        quantize_activation(x, **options)
