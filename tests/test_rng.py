"""Counter RNG: published test vectors, the same bits in every variant, offsets, statistics."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest

import flcore
from flcore import _native, _variants
from flcore.errors import DTypeError, InvalidInputError, VariantUnavailableError
from flcore.ops import random_bits, random_normal, random_uniform
from flcore.reference import rng as reference
from flcore.reference.rng import philox4x32_10
from support import HAS_TORCH, ROOT, SIZES, Guarded, outputs_per_level

CPU_VARIANTS = [v for v, why in _variants.available("random", "cpu").items() if not why]
FAST_VARIANTS = [v for v in CPU_VARIANTS if v != "reference"]
FORMS = {"bits": random_bits, "uniform": random_uniform, "normal": random_normal}
# Every word of the name at both ends of its range, and in the middle: no word may be dropped,
# swapped, cut to 31 bits or taken for a sign.
NAMES = (
    {"seed": 0},
    {"seed": 1, "round": 2, "tensor": 3, "client": 4},
    {"seed": 2**64 - 1, "round": 2**32 - 1, "tensor": 2**32 - 1, "client": 2**32 - 1},
    {"seed": 2**63, "round": 2**31, "tensor": 2**31 - 1, "client": 1},
    {"seed": 2**32 - 1, "round": 0, "tensor": 2**31, "client": 0},
)
# The four positions in a block, and the two ends of a stream (2^34 values).
OFFSETS = (0, 1, 2, 3, 5, 2**32 - 3, 2**33 + 1)


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(counter, key, block):
    # "known answer" vectors published with the Random123 library for philox4x32-10
    want = [int(word, 16) for word in block.split()]
    assert [int(w) for w in philox4x32_10(*counter, *key)] == want
    c0, c1, c2, c3 = counter
    name = {"seed": key[1] << 32 | key[0], "tensor": c1, "round": c2, "client": c3}
    offset = 4 * c0
    for variant in CPU_VARIANTS:
        got = random_bits(4, **name, offset=offset, variant=variant)
        assert got.tolist() == want, variant


# ---- every variant has the same bits -----------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", FAST_VARIANTS)
def test_variant_has_the_bits_of_the_reference(variant, form):
    dtype = np.dtype("uint32" if form == "bits" else "float32")
    sizes = (1, 5, 4097) if variant == "triton" else SIZES  # the interpreter is slow
    for name in NAMES:
        for size in sizes:
            for offset in OFFSETS:
                guarded = Guarded(size, dtype, offset=1)
                out = FORMS[form](size, **name, offset=offset, out=guarded.array, variant=variant)
                want = FORMS[form](size, **name, offset=offset, variant="reference")
                assert out is guarded.array
                assert out.tobytes() == want.tobytes(), (name, size, offset)
                guarded.check()


@pytest.mark.parametrize("form", ["bits", "normal"])
@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_pieces_of_a_stream_are_the_stream(variant, form):
    whole = FORMS[form](1000, 11, round=1, variant=variant)
    cuts = [0, 1, 4, 7, 130, 131, 600, 1000]  # within blocks, on their borders, vectors apart
    pieces = [
        FORMS[form](b - a, 11, round=1, offset=a, variant=variant)
        for a, b in itertools.pairwise(cuts)
    ]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()


def test_the_end_of_a_stream():
    last = random_bits(3, 5, offset=2**34 - 3)
    block = philox4x32_10(2**32 - 1, 0, 0, 0, 5, 0)
    assert last.tolist() == [int(w) for w in block[1:]]
    assert random_bits(0, 5, offset=2**34).shape == (0,)


LEVELS_SCRIPT = """
import hashlib
from flcore.ops import random_bits, random_normal, random_uniform
for make in (random_bits, random_uniform, random_normal):
    for offset in (0, 1, 2**33 + 2):
        out = make(100_003, 9, round=1, tensor=2, client=3, offset=offset)
        print(hashlib.sha256(out.tobytes()).hexdigest())
"""


def test_instruction_sets_give_identical_bits():
    printed = outputs_per_level(LEVELS_SCRIPT)
    assert len(printed) >= 1 and len(set(printed.values())) == 1, printed.keys()


@pytest.mark.parametrize("form", FORMS)
def test_thread_counts_give_identical_bits(form):
    results = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        results.add(FORMS[form](300_001, 4, offset=1).tobytes())
    assert len(results) == 1


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch_tensors_hold_the_same_values():
    import torch

    want = random_uniform(100, 3)
    made = random_uniform(100, 3, device="cpu")
    assert isinstance(made, torch.Tensor) and made.dtype == torch.float32
    assert made.numpy().tobytes() == want.tobytes()
    out = torch.empty(10, 10)
    assert random_uniform(100, 3, out=out) is out
    assert out.numpy().tobytes() == want.tobytes()
    assert random_bits(4, 3, device="cpu").dtype == torch.uint32


# ---- the transform to normals ------------------------------------------------------------------


def box_muller(first, second):
    """Return both normals in float64: u1 = (first + 1) / 2^32, u2 = (second >> 7) / 2^25."""
    r = np.sqrt(-2 * np.log((first.astype(np.float64) + 1) / 2**32))
    angle = 2 * np.pi * (second >> np.uint32(7)) / 2**25
    return r * np.cos(angle), r * np.sin(angle)


def test_normals_by_hand():
    # u1 = 1/2 and u2 = 0, 1/4, 1/2, 3/4: sqrt(2 ln 2) = 1.17741 along an axis
    half = np.full(4, 2**31 - 1, np.uint32)
    cosine, sine = reference.turn(np.array([0, 2**30, 2**31, 3 * 2**30], np.uint32))
    np.testing.assert_allclose(reference.radius(half), math.sqrt(2 * math.log(2)), rtol=1e-7)
    assert cosine.tolist() == [1, 0, -1, 0] and sine.tolist() == [0, 1, 0, -1]
    # u1 = 1 gives 0, u1 = 2^-32 the end of the tail
    ends = reference.radius(np.array([2**32 - 1, 0], np.uint32))
    assert ends[0] == 0 and ends[1] == pytest.approx(math.sqrt(64 * math.log(2)), abs=5e-7)
    # elements 2k and 2k + 1 come from words 2k and 2k + 1
    words = random_bits(6, 3)
    want = np.stack(box_muller(words[::2], words[1::2]), axis=1).reshape(-1)
    np.testing.assert_allclose(random_normal(6, 3), want, rtol=0, atol=1e-6)


def test_normals_are_within_a_millionth_of_the_exact_transform():
    rng = np.random.default_rng(0)
    near = np.arange(4096, dtype=np.int64)
    edges = [int(k * 2**29) for k in range(9)]  # octants of the angle, binades of u1
    some = np.concatenate([near, 2**32 - 1 - near, *(e + near - 2048 for e in edges)])
    tail = rng.integers(0, 2**12, 200_000)  # the largest values have the largest errors
    words = [np.concatenate([some % 2**32, tail, rng.integers(0, 2**32, 200_000)])]
    words.append(rng.permutation(words[0]))
    first, second = (w.astype(np.uint32) for w in words)
    r = reference.radius(first)
    cosine, sine = reference.turn(second)
    for got, want in zip((r * cosine, r * sine), box_muller(first, second), strict=True):
        assert got.dtype == np.float32
        assert np.abs(got - want).max() < 1e-6
        assert np.abs(got).max() < 6.661


def test_constants_of_the_transform_are_the_same_everywhere():
    text = (ROOT / "csrc" / "box_muller.h").read_text()
    found = re.findall(r"(\w+) = (-?0x[0-9a-f.]+p[-+]\d+)f", text)
    cpp = {name: float.fromhex(value) for name, value in found}
    coefficients = {"ATANH": reference._ATANH, "SIN": reference._SIN, "COS": reference._COS}
    python = {
        f"{name}_{k}": float.fromhex(value)
        for name, values in coefficients.items()
        for k, value in enumerate(values)
    }
    assert python.pop("COS_0") == 1
    python["LN2_HI"], python["LN2_LO"] = (float.fromhex(value) for value in reference._LN2)
    assert cpp == python
    assert all(np.float32(value) == value for value in cpp.values())
    # the high part times any exponent is exact; the parts make up ln 2
    high = np.float32(cpp["LN2_HI"])
    assert all(float(np.float32(e) * high) == e * float(high) for e in range(-33, 0))
    assert cpp["LN2_HI"] + cpp["LN2_LO"] == pytest.approx(math.log(2), rel=1e-12)
    if "triton" in CPU_VARIANTS:
        from flcore.pykernels import rng as kernels

        assert {name: getattr(kernels, name).value for name in cpp} == cpp


# ---- statistics --------------------------------------------------------------------------------
# Seeded, hence not flaky: each bound is five standard deviations, which chance alone would pass
# in all but 6 of 10^7 seeds.


def test_every_bit_is_set_half_the_time():
    bits = random_bits(1 << 18, 1)
    for k in range(32):
        ones = int(((bits >> np.uint32(k)) & np.uint32(1)).sum())
        assert abs(ones - bits.size / 2) < 5 * np.sqrt(bits.size) / 2, k


def test_uniforms_have_the_moments_and_the_range_of_the_uniform_law():
    x = random_uniform(1 << 20, 2).astype(np.float64)
    assert 0 <= x.min() < 1e-5 and 1 - 1e-5 < x.max() < 1
    assert abs(x.mean() - 0.5) < 5 * np.sqrt(1 / 12 / x.size)
    assert abs(((x - 0.5) ** 2).mean() - 1 / 12) < 5 * np.sqrt(1 / 180 / x.size)
    counts = np.bincount((x * 256).astype(int), minlength=256)
    chi2 = ((counts - x.size / 256) ** 2 / (x.size / 256)).sum()
    assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255)


def test_normals_have_the_moments_and_the_quantiles_of_the_normal_law():
    stats = pytest.importorskip("scipy.stats")
    x = random_normal(1_000_000, 2).astype(np.float64)
    assert abs(x.mean()) < 5 / 1000
    assert abs(x.std() - 1) < 0.005
    assert abs((x**3).mean()) < 5 * np.sqrt(15 / x.size)
    assert abs((x**4).mean() - 3) < 5 * np.sqrt(96 / x.size)
    assert stats.kstest(x, "norm").pvalue > 1e-6
    for level in (2, 3, 4):  # as many beyond each level as the tail holds
        expected = 2 * x.size * stats.norm.sf(level)
        assert abs((np.abs(x) > level).sum() - expected) < 5 * np.sqrt(expected)
    # the two values of a pair: uncorrelated in size too, and the angle is uniform
    a, b = x[::2], x[1::2]
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(a.size)
    assert abs(np.corrcoef(a**2, b**2)[0, 1]) < 5 / np.sqrt(a.size)
    turns = np.bincount(((np.arctan2(b, a) / (2 * np.pi) + 0.5) * 64).astype(int) % 64)
    chi2 = ((turns - a.size / 64) ** 2 / (a.size / 64)).sum()
    assert abs(chi2 - 63) < 5 * np.sqrt(2 * 63)


@pytest.mark.parametrize("make", [random_uniform, random_normal])
@pytest.mark.parametrize("word", ["seed", "round", "tensor", "client"])
def test_neighbouring_streams_are_uncorrelated(word, make):
    name = {"seed": 1, "round": 1, "tensor": 1, "client": 1}
    x = make(1 << 18, **name).astype(np.float64)
    for step in (1, 2, 1 << 16):
        y = make(1 << 18, **{**name, word: 1 + step}).astype(np.float64)
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(x.size)


@pytest.mark.parametrize("make", [random_uniform, random_normal])
def test_neighbours_within_a_stream_are_uncorrelated(make):
    x = make(1 << 18, 6).astype(np.float64)
    for lag in (1, 2, 3, 4, 64):
        assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 5 / np.sqrt(x.size - lag)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"numel": -1}, InvalidInputError, "numel: expected 0 <= numel"),
        ({"numel": 2.5}, DTypeError, "numel: expected an integer, got float"),
        ({"seed": -1}, InvalidInputError, "seed: expected 0 <= seed < 18446744073709551616"),
        ({"seed": 2**64}, InvalidInputError, "seed"),
        ({"seed": "7"}, DTypeError, "seed: expected an integer, got str"),
        ({"round": 2**32}, InvalidInputError, "round: expected 0 <= round < 4294967296"),
        ({"tensor": -1}, InvalidInputError, "tensor"),
        ({"client": 2**40}, InvalidInputError, "client"),
        ({"offset": 2**34 - 3}, InvalidInputError, "offset: a stream has 2\\^34 values"),
        ({"out": np.zeros(3, np.uint32)}, InvalidInputError, "out: expected 4 values, got 3"),
        ({"out": np.zeros(4, np.int32)}, DTypeError, "out: expected an array of uint32, got int32"),
        ({"out": [0, 0, 0, 0]}, DTypeError, "got list"),
        ({"out": np.zeros(8, np.uint32)[::2]}, InvalidInputError, "contiguous"),
        (
            {"out": np.frombuffer(bytes(16), np.uint32)},
            InvalidInputError,
            "out: the array is read-only",
        ),
        (
            {"out": np.zeros(4, np.uint32), "device": "cpu"},
            InvalidInputError,
            "device: give either out or device",
        ),
        ({"variant": "cuda"}, VariantUnavailableError, "cuda"),
        ({"variant": "fpga"}, InvalidInputError, "fpga"),
    ],
)
def test_bad_arguments_are_named(arguments, error, says):
    with pytest.raises(error, match=says):
        random_bits(**{"numel": 4, "seed": 0, **arguments})


def test_normals_check_their_arguments_too():
    with pytest.raises(DTypeError, match="out: expected an array of float32, got uint32"):
        random_normal(4, 0, out=np.zeros(4, np.uint32))
    with pytest.raises(InvalidInputError, match="offset: a stream has 2\\^34 values"):
        random_normal(4, 0, offset=2**34 - 3)
    with pytest.raises(ValueError, match="form: unknown code 3"):
        _native.core.random(0, 0, 3, 0, 0, 0, 0, 0, 1)
