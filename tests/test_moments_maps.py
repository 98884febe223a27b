"""What moments come along with: weighted sums, affine maps, blends; and the memory of them."""

from __future__ import annotations

import numpy as np
import pytest

from flcore import _arrays
from flcore.aggregation import Accumulator
from flcore.ops import accumulate_moments, affine, moments, moments_each
from flcore.ops.moments import affine_views, moments_views
from support import DTYPES, EPS, HAS_TORCH, Guarded, np_dtype, unaligned
from test_moments import (
    CPU_VARIANTS,
    NUMPY_VARIANTS,
    accumulator_dtype,
    exact,
    same,
    seen_by,
    to_numpy,
    values,
)

# ---- sums and maps -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["raise", "propagate"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_has_the_bits_of_an_accumulator(dtype, policy, rng):
    for size in (1, 15, 33, 4096, 4099, 70_001):
        rows = [values(rng, size, dtype) for _ in range(3)]
        total = Accumulator(rows[0])
        acc = np.zeros(size, accumulator_dtype(dtype))
        for row, weight in zip(rows, (2.0, 0.3, 7.0), strict=True):
            total.add(row, weight)
            m = accumulate_moments(acc, row, weight / 2.0, nonfinite=policy)
            assert same(m, moments(row))
        assert acc.tobytes() == total._state[0].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_sums_of_every_variant_match_the_definition(variant, dtype, rng):
    x, start = values(rng, 300, dtype), rng.standard_normal(300)
    for policy in ("raise", "propagate"):
        acc = seen_by(variant, start.astype(accumulator_dtype(dtype)))
        accumulate_moments(acc, seen_by(variant, x), -0.3, nonfinite=policy, variant=variant)
        want = start - 0.3 * x.astype(np.float64)
        eps = EPS[accumulator_dtype(dtype)]
        np.testing.assert_allclose(to_numpy(acc), want, rtol=0, atol=3 * eps * 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_maps_are_rounded_once(variant, dtype, rng):
    layers = [values(rng, n, dtype) for n in (1, 17, 300, 1025)]
    scale, shift = [1.1, -0.37, 1e-3, 3.0], [0.0, 2.2, 0.7, -9.0]
    got = affine([seen_by(variant, x) for x in layers], scale, shift, variant=variant)
    for x, a, b, y in zip(layers, scale, shift, got, strict=True):
        want = a * x.astype(np.float64) + b
        bound = EPS[dtype] / 2 * np.abs(want) * (1 + 2**-40) + 2.0**-60
        if dtype == "float16":
            bound += 2.0**-25  # half a step among the subnormal numbers
        assert (np.abs(to_numpy(y).astype(np.float64) - want) <= bound).all()


@pytest.mark.parametrize(("dtype", "step"), [("float16", 2.0**-10), ("bfloat16", 2.0**-7)])
def test_maps_to_16_bits_do_not_pass_through_a_tie(dtype, step):
    # just above the middle between 1 and the next number; float32 in between would see the middle
    shift = 1 + step / 2 + 2.0**-40
    for size in (1, 64):
        got = affine(np.zeros(size, np_dtype(dtype)), 1.0, shift).astype(np.float64)
        np.testing.assert_array_equal(got, 1 + step)
        below = affine(np.zeros(size, np_dtype(dtype)), 1.0, shift - 2.0**-39).astype(np.float64)
        np.testing.assert_array_equal(below, 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scale_one_copies_every_16_bit_value(dtype):
    bits = np.arange(1 << 16, dtype=np.uint16).view(np_dtype(dtype))
    finite = bits[np.isfinite(bits.astype(np.float32))]
    for variant in NUMPY_VARIANTS:
        assert affine(finite, 1.0, 0.0, variant=variant).tobytes() == finite.tobytes()
    through = affine(bits, 1.0, 0.0, nonfinite="propagate")
    assert (np.isnan(through.astype(np.float32)) == np.isnan(bits.astype(np.float32))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", NUMPY_VARIANTS)
def test_blends_match_their_definition(variant, dtype, rng):
    row, acc = values(rng, 5003, dtype), rng.standard_normal(5003)
    acc = acc.astype(accumulator_dtype(dtype))
    views, accs = [_arrays.view(row)], [_arrays.view(acc)]
    for weight in (0.5, 0.0):
        z = 0.25 * acc.astype(np.float64) + weight * row.astype(np.float64)
        m = moments_views([views], blend=(accs, 0.25, weight), variant=variant)
        np.testing.assert_allclose([m.mean[0, 0], m.m2[0, 0]], exact(z), rtol=1e-12)
        out = _arrays.view(np.empty_like(row))
        assert not affine_views(
            views, [3.0], [1.0], [out], blend=(accs, 0.25, weight), variant=variant
        )
        np.testing.assert_allclose(
            out.array.astype(np.float64), 3 * z + 1, rtol=EPS[dtype], atol=1e-6
        )
        if weight == 0:  # then the row is not read
            empty = [_arrays.view(np.full_like(row, np.nan))]
            again = moments_views([empty], blend=(accs, 0.25, 0.0), variant=variant)
            assert same(again, m)


# ---- memory: tails, alignment, guards, read-only, strides --------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_input_and_guarded_output(dtype, rng):
    for size in (1, 5, 16, 33, 4099):
        x = values(rng, size, dtype)
        want, mapped = moments(x), affine(x, 1.5, -1.0)
        total = np.ones(size, accumulator_dtype(dtype))
        accumulate_moments(total, x, 0.5)
        for offset in (0, 1, 3):
            shifted = unaligned(x, 1 + offset)
            assert same(moments(shifted), want)
            out = Guarded(size, np_dtype(dtype), offset)
            affine(shifted, 1.5, -1.0, out=out.array, nonfinite="propagate")
            out.check()
            assert out.array.tobytes() == mapped.tobytes()
            for policy in ("raise", "propagate"):
                acc = Guarded(size, np.dtype(accumulator_dtype(dtype)), offset)
                acc.array[...] = 1
                assert same(accumulate_moments(acc.array, shifted, 0.5, nonfinite=policy), want)
                acc.check()
                assert acc.array.tobytes() == total.tobytes()


def test_read_only_strided_and_swapped_inputs(rng):
    base = rng.standard_normal((40, 30)).astype(np.float32)
    frozen = base.copy()
    frozen.flags.writeable = False
    want = moments(base)
    for other in (frozen, base.astype(">f4"), np.asfortranarray(base)):
        assert same(moments(other), want)
        np.testing.assert_array_equal(affine(other, 2.0, 1.0), 2 * base + 1)
    assert same(moments(base[::2, ::3]), moments(base[::2, ::3].copy()))


def test_out_is_returned_and_may_be_the_input_or_strided(rng):
    x = values(rng, 5000, "float32")
    want = affine(x, 3.0, 1.0)
    for policy in ("raise", "propagate"):
        again = x.copy()
        assert affine(again, 3.0, 1.0, out=again, nonfinite=policy) is again
        np.testing.assert_array_equal(again, want)
        strided = np.zeros(10_000, np.float32)[::2]
        affine(x, 3.0, 1.0, out=strided, nonfinite=policy)
        np.testing.assert_array_equal(strided, want)


def test_accumulators_are_found_by_key_and_nothing_is_empty_handed(rng):
    update = {"a": np.float32([1, 2]), "b": np.float64([3])}
    acc = {"b": np.zeros(1), "a": np.zeros(2, np.float32)}
    accumulate_moments(acc, update, 2.0)
    assert acc["a"].tolist() == [2, 4] and acc["b"].tolist() == [6]
    assert moments([]).mean.shape == (0,) and affine([], 1.0, 0.0) == []
    assert moments_each([[], []]).m2.shape == (2, 0)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch_tensors(rng):
    import torch

    x = torch.from_numpy(rng.standard_normal((30, 40))).float().requires_grad_()
    want = moments(x.detach().numpy())
    assert same(moments([x]), want)
    mapped = affine({"w": x}, 2.0, 0.5)["w"]
    assert torch.equal(mapped, 2 * x.detach() + 0.5) and not mapped.requires_grad
    strided = x.detach().t()
    assert same(moments(strided), moments(strided.contiguous()))
    half = x.detach().bfloat16()
    assert same(moments(half), moments(half.float()))
    acc = torch.zeros(30, 40)
    accumulate_moments(acc, half, 1.0)
    assert torch.equal(acc, half.float())
