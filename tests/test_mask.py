"""Secure sums: fixed-point numbers by hand, variants, exactness, errors."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore import _arrays
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError, VariantUnavailableError
from flcore.ops import dequantize_sum, mask_add, modular_sum
from flcore.ops._mask_layers import quantize_layers
from flcore.ops.mask import Mask, quantize
from support import DTYPES, HAS_TORCH, SIZES, Guarded, np_dtype, outputs_per_level, unaligned

VARIANTS = ("cpu", "reference")
LEVELS, CLIP = 1 << 22, 8.0
KEYS = [bytes((31 * i + 7 * j) % 256 for j in range(32)) for i in range(4)]


def masks(count: int) -> list[Mask]:
    return [Mask(KEYS[i], (1, -1)[i % 2], bytes([i] * 12)) for i in range(count)]


# ---- numbers by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_levels_by_hand(variant, rounding):  # whole levels: no rounding changes them
    x = np.float32([-9, -8, 0, 0.5, 8, -1.25, 3])
    words, clipped = quantize(x, rounding=rounding, seed=1, variant=variant)
    assert words.tolist() == [0, 0, 2097152, 2228224, 4194304, 1769472, 2883584]
    assert clipped == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sum_of_three_by_hand(variant):
    words, _ = quantize(np.array([0.5, -1.25, 3.0]), rounding="nearest")
    total = modular_sum(words.reshape(3, 1), variant=variant)
    got = dequantize_sum(total, 3, dtype="float64", variant=variant)
    assert got.tolist() == [2.25]  # 18.25 - 16


def test_nearest_ties_go_to_even():
    x = np.array([0.5, 1.5, 2.5, 3.5, 3.5 + 1e-12])
    words, _ = quantize(x, clip=4.0, levels=8, rounding="nearest")
    assert words.tolist() == [4, 6, 6, 8, 8]  # u = 4.5, 5.5, 6.5, 7.5


# ---- every variant against the reference -------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_has_the_words_of_the_reference(dtype, rounding, rng):
    for size in SIZES:
        x = (4 * rng.standard_normal(size)).astype(np_dtype(dtype))
        for count, position, bits in ((0, 0, 32), (1, 1, 32), (3, 4099, 27)):
            options = {
                "scale": 1.7,
                "rounding": rounding,
                "seed": 2**64 - 1,
                "round": 2,
                "tensor": 3,
                "client": 2**32 - 1,
                "offset": position % 7,
                "masks": masks(count),
                "position": position,
                "bits": bits,
            }
            want, clipped = quantize(x, variant="reference", **options)
            got, same = quantize(unaligned(x), variant="cpu", **options)
            assert got.tobytes() == want.tobytes(), (size, count)
            assert clipped == same and (size < 1000 or clipped > 0)


@pytest.mark.parametrize("clip", [1e-3, 0.1, 3.0, 1e6])
@pytest.mark.parametrize("levels", [1, 3, 1000, 2**31 + 1, 2**32 - 1])
def test_no_word_is_above_the_top_level(levels, clip, rng):
    x = np.concatenate([rng.uniform(-clip, clip, 500), [clip, np.nextafter(clip, 0), -clip, 1e308]])
    for rounding in ("nearest", "stochastic"):
        options = {"clip": clip, "levels": levels, "rounding": rounding, "seed": 3}
        words, _ = quantize(x, **options)
        assert words[[500, 502, 503]].tolist() == [levels, 0, levels]
        assert words.max() <= levels
        assert words.tobytes() == quantize(x, variant="reference", **options)[0].tobytes()
        within = 0.5 + 1e-6 if rounding == "nearest" else 1 + 1e-6
        back = dequantize_sum(words, 1, clip=clip, levels=levels, dtype="float64")
        steps = np.abs(back - np.clip(x, -clip, clip)) * levels / (2 * clip)
        assert steps.max() <= within + levels * 2.0**-50


@pytest.mark.parametrize("bits", [32, 31, 9, 1])
def test_masks_and_sums_have_the_words_of_the_reference(bits, rng):
    for size in SIZES:
        rows = [unaligned(rng.integers(0, 2**32, size, np.uint32), i + 1) for i in range(11)]
        for n in (1, 2, 3, 8, 11):
            start = rng.integers(0, 2**32, size, np.uint32)
            wide = start.astype(object) + sum(r.astype(object) for r in rows[:n])
            for variant in VARIANTS:
                guarded = Guarded(size, np.dtype(np.uint32), offset=1)
                guarded.array[:] = start
                out = modular_sum(rows[:n], acc=guarded.array, bits=bits, variant=variant)
                assert out is guarded.array
                guarded.check()
                assert out.tolist() == (wide % 2**bits).tolist()
        want = mask_add(rows[0], masks(3), position=11, bits=bits, variant="reference")
        guarded = Guarded(size, np.dtype(np.uint32), offset=1)
        assert mask_add(rows[0], masks(3), position=11, bits=bits, out=guarded.array) is (
            guarded.array
        )
        guarded.check()
        assert guarded.array.tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_the_exact_sum_once(dtype, rng):
    from fractions import Fraction

    for size in SIZES:
        words = rng.integers(0, 7 * LEVELS, size, np.uint32, endpoint=True)
        guarded = Guarded(size, np_dtype(dtype))
        got = dequantize_sum(words, 7, divisor=3.0, out=guarded.array)
        guarded.check()
        assert got is guarded.array
        factor = Fraction(CLIP / (LEVELS * 3.0))
        exact = [float((2 * int(z) - 7 * LEVELS) * factor) for z in words]
        assert got.tobytes() == np.array(exact).astype(np_dtype(dtype)).tobytes()
        if dtype != "bfloat16":
            want = dequantize_sum(words, 7, divisor=3.0, dtype=dtype, variant="reference")
            assert got.tobytes() == want.tobytes()


def test_kernels_write_nothing_outside(rng):
    for size in SIZES:
        x = rng.standard_normal(size).astype(np.float32)
        guarded = Guarded(size, np.dtype(np.uint32), offset=1)
        quantize_layers(
            [_arrays.view(x)],
            guarded.array,
            scale=1.0,
            clip=CLIP,
            levels=LEVELS,
            rounding="stochastic",
            stream=(1, 2, 3),
            masks=masks(2),
            position=5,
            bits=32,
            variant="cpu",
        )
        guarded.check()
        want, _ = quantize(x, seed=1, round=2, client=3, masks=masks(2), position=5)
        assert guarded.array.tobytes() == want.tobytes()


LEVELS_SCRIPT = """
import hashlib, numpy as np, ml_dtypes
from flcore.ops import dequantize_sum, mask_add, modular_sum
from flcore.ops.mask import Mask, quantize
rng = np.random.default_rng(5)
keys = [Mask(bytes([i] * 32), (1, -1)[i % 2]) for i in range(3)]
for dtype in ("float64", "float32", "float16", ml_dtypes.bfloat16):
    x = (5 * rng.standard_normal(9001)).astype(dtype)
    for rounding in ("nearest", "stochastic"):
        words, clipped = quantize(x, scale=0.3, clip=2.7, rounding=rounding, seed=9, masks=keys,
                                  position=3, bits=30)
        print(clipped, hashlib.sha256(words.tobytes()).hexdigest())
    total = modular_sum([words, words, words], bits=30)
    print(hashlib.sha256(mask_add(total, keys, position=2**33 + 1).tobytes()).hexdigest())
    back = dequantize_sum(total, 256, clip=2.7, divisor=1.1, dtype=np.dtype(dtype).name
                          if dtype is not ml_dtypes.bfloat16 else "float32")
    print(hashlib.sha256(back.tobytes()).hexdigest())
"""


def test_instruction_sets_give_identical_bits():
    printed = outputs_per_level(LEVELS_SCRIPT)
    assert len(printed) >= 1 and len(set(printed.values())) == 1, printed.keys()


def test_thread_counts_give_identical_bits(rng):
    x = rng.standard_normal(300_001).astype(np.float32)
    results = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        words, clipped = quantize(x, clip=2.0, seed=1, masks=masks(2), position=1)
        total = modular_sum([words] * 5)
        hidden = mask_add(total, masks(1), position=7)
        back = dequantize_sum(hidden & np.uint32(LEVELS - 1), 1)
        results.add((clipped, words.tobytes(), total.tobytes(), hidden.tobytes(), back.tobytes()))
    assert len(results) == 1


# ---- exactness and unbiasedness ----------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_stochastic_rounding_is_unbiased(variant):
    # 10^5 roundings of a value a third of the way between two levels; seeded, so not flaky
    clip, levels, repeats = 1.0, 8, 100_000
    for x in (0.0833, -0.71, 0.999):
        u = (x + clip) * levels / (2 * clip)
        words, _ = quantize(np.full(repeats, x), clip=clip, levels=levels, seed=4, variant=variant)
        assert set(np.unique(words)) == {int(u), int(u) + 1}
        deviation = np.sqrt((u - int(u)) * (1 - u + int(u)) / repeats)
        assert abs(words.mean() - u) < 5 * deviation


def test_roundings_of_clients_layers_and_rounds_differ(rng):
    x = rng.uniform(-1, 1, 1000)
    name = {"seed": 1, "round": 1, "tensor": 1, "client": 1}
    first, _ = quantize(x, **name)
    assert quantize(x, **name)[0].tobytes() == first.tobytes()
    for word in name:
        other, _ = quantize(x, **{**name, word: 2})
        assert np.abs(other.astype(int) - first.astype(int)).max() == 1


def test_a_mask_and_its_opposite_cancel(rng):
    words = rng.integers(0, 2**32, 1000, np.uint32)
    both = [Mask(KEYS[0]), Mask(KEYS[1]), Mask(KEYS[0], -1), Mask(KEYS[1], -1)]
    assert (mask_add(words, both) == words).all()
    hidden = mask_add(words, both[:2])
    assert (hidden != words).mean() > 0.99
    assert mask_add(hidden, both[2:], out=hidden) is hidden  # in place
    assert (hidden == words).all()


def test_overlapping_memory_is_read_before_it_is_written(rng):
    memory = rng.integers(0, 2**32, 10_001, np.uint32)
    want = mask_add(memory[:-1], masks(1))
    assert mask_add(memory[:-1], masks(1), out=memory[1:]).tobytes() == want.tobytes()
    rows = rng.integers(0, 2**32, (10, 5000), np.uint32)
    want = modular_sum([*rows, rows[0]])
    assert modular_sum(rows, acc=rows[0]).tobytes() == want.tobytes()


def test_rows_may_be_strided_foreign_endian_and_read_only(rng):
    memory = rng.integers(0, 2**32, (3, 200), np.uint32)
    memory.flags.writeable = False
    want = modular_sum(np.ascontiguousarray(memory[:, ::2]))
    swapped = memory[:, ::2].astype(">u4")
    assert (modular_sum(list(memory[:, ::2])) == want).all()
    assert (modular_sum(list(swapped)) == want).all()
    assert modular_sum(np.zeros((3, 0), np.uint32)).shape == (0,)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch_tensors_give_the_words_of_numpy(rng):
    import torch

    x = rng.uniform(-1, 1, 500).astype(np.float32)
    tensor = torch.from_numpy(x.copy())
    words, _ = quantize(tensor, seed=1, masks=masks(1))
    assert words.dtype == torch.uint32
    want, _ = quantize(x, seed=1, masks=masks(1))
    assert words.numpy().tobytes() == want.tobytes()
    for variant in VARIANTS:
        plain = mask_add(words, [Mask(KEYS[0], -1, bytes(12))], variant=variant)
        total = modular_sum([plain, plain], variant=variant)
        back = dequantize_sum(total, 2, dtype="bfloat16", variant=variant)
        assert back.dtype == torch.bfloat16
        np.testing.assert_allclose(back.float().numpy(), 2 * x, rtol=2.0**-8, atol=8e-6)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("variant", VARIANTS)
def test_non_finite_values_are_refused_and_nothing_is_written(variant, bad):
    for size, at in ((1, 0), (33, 32), (5000, 4097)):
        x = np.zeros(size, np.float32)
        x[at] = bad
        out = np.full(size, 7, np.uint32)
        with pytest.raises(NonFiniteError, match="x: NaN or infinity"):
            quantize(x, rounding="nearest", out=out, variant=variant)
        assert (out == 7).all()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"clip": 0}, InvalidInputError, "clip: expected a finite number above 0, got 0"),
        ({"clip": float("nan")}, InvalidInputError, "clip"),
        ({"clip": 1.5e308}, InvalidInputError, "clip: the step between levels"),
        ({"clip": 1e-320}, InvalidInputError, "clip: the step between levels"),
        ({"clip": "8"}, None, ""),
        ({"clip": None}, DTypeError, "clip: expected a number, got NoneType"),
        ({"scale": float("inf")}, InvalidInputError, "scale"),
        ({"levels": 0}, InvalidInputError, "levels: expected 1 <= levels <= 4294967295, got 0"),
        ({"levels": 2**32}, InvalidInputError, "levels"),
        ({"levels": 2**22, "bits": 22}, InvalidInputError, "levels <= 4194303"),
        ({"levels": 4.0}, DTypeError, "levels: expected an integer, got float"),
        ({"bits": 33}, InvalidInputError, "bits: expected 1 <= bits <= 32, got 33"),
        ({"rounding": "up"}, InvalidInputError, "rounding"),
        ({"seed": None}, InvalidInputError, "seed: stochastic rounding needs one"),
        ({"seed": -1}, InvalidInputError, "seed"),
        ({"round": 2**32}, InvalidInputError, "round"),
        ({"client": -1}, InvalidInputError, "client"),
        ({"tensor": 2**32}, InvalidInputError, "tensor"),
        ({"offset": 2**34 - 3}, InvalidInputError, "offset: a stream has 2\\^34 values"),
        ({"position": -1}, InvalidInputError, "position"),
        ({"position": 2**36 - 3}, InvalidInputError, "position: a mask stream has"),
        ({"masks": [Mask(bytes(31))]}, InvalidInputError, "masks\\[0\\].key: expected 32 bytes"),
        ({"masks": [Mask("k" * 32)]}, DTypeError, "masks\\[0\\].key: expected 32 bytes, got str"),
        ({"masks": [Mask(bytes(32), 2)]}, InvalidInputError, "masks\\[0\\].sign"),
        ({"masks": [Mask(bytes(32), 1, bytes(8))]}, InvalidInputError, "nonce: expected 12 bytes"),
        ({"masks": [bytes(32)]}, DTypeError, "masks\\[0\\]: expected a Mask"),
        ({"out": np.zeros(3, np.uint32)}, InvalidInputError, "out: expected 4 words, got 3"),
        ({"out": np.zeros(4, np.int32)}, DTypeError, "out: expected an array of uint32, got int32"),
        ({"out": np.zeros(8, np.uint32)[::2]}, InvalidInputError, "out: expected a contiguous"),
        ({"out": np.frombuffer(bytes(16), np.uint32)}, InvalidInputError, "out: the array is read"),
        ({"x": np.zeros(4, np.int64)}, DTypeError, "x: expected float64"),
        ({"x": [0.0]}, DTypeError, "x: expected a NumPy array"),
        ({"variant": "cuda"}, VariantUnavailableError, "mask_quantize has no cuda variant"),
    ],
)
def test_bad_arguments_of_quantize_are_named(arguments, error, says):
    call = {"x": np.zeros(4, np.float32), "seed": 0, **arguments}
    if error is None:
        quantize(call.pop("x"), **call)
        return
    with pytest.raises(error, match=says):
        quantize(call.pop("x"), **call)


def test_bad_words_are_named():
    words = np.zeros(4, np.uint32)
    with pytest.raises(DTypeError, match="words: expected an array of uint32, got uint8"):
        mask_add(np.zeros(4, np.uint8), [])
    with pytest.raises(InvalidInputError, match="rows: expected at least one"):
        modular_sum([])
    with pytest.raises(DTypeError, match="rows: expected a list of arrays of words, got NoneType"):
        modular_sum(None)
    with pytest.raises(InvalidInputError, match=r"rows\[1\]: expected 4 words on cpu, got 5"):
        modular_sum([words, np.zeros(5, np.uint32)])
    with pytest.raises(DTypeError, match=r"rows\[1\]: expected an array of uint32, got float32"):
        modular_sum([words, np.zeros(4, np.float32)], acc=words)
    with pytest.raises(InvalidInputError, match="divisor: expected a finite number above 0"):
        dequantize_sum(words, 1, divisor=0)
    with pytest.raises(DTypeError, match="dtype: expected one of"):
        dequantize_sum(words, 1, dtype="int32")
    with pytest.raises(InvalidInputError, match="out: expected 4 values, got 3"):
        dequantize_sum(words, 1, out=np.zeros(3))
    with pytest.raises(DTypeError, match="dtype: NumPy has no bfloat16"):
        dequantize_sum(words, 1, dtype="bfloat16")
    with pytest.raises(InvalidInputError, match="clients: expected 1 <= clients <= 1024"):
        dequantize_sum(np.zeros(3, np.uint32), 1025)


def test_words_above_the_top_are_refused():
    words = np.full(50, 2 * LEVELS + 1, np.uint32)
    with pytest.raises(InvalidInputError, match="50 of 50 are above clients \\* levels = 8388608"):
        dequantize_sum(words, 2)


def test_a_key_is_not_printed():
    assert repr(Mask(b"secret" + bytes(26))) == f"Mask(key=..., sign=1, nonce={bytes(12)!r})"
