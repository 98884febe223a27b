"""Counter RNG: published test vectors, the same bits in every variant, offsets, statistics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import flcore
from flcore import _variants
from flcore.errors import DTypeError, InvalidInputError, VariantUnavailableError
from flcore.ops import random_bits, random_uniform
from flcore.reference.rng import philox4x32_10
from support import HAS_TORCH, SIZES, Guarded, outputs_per_level

CPU_VARIANTS = [v for v, why in _variants.available("random", "cpu").items() if not why]
FAST_VARIANTS = [v for v in CPU_VARIANTS if v != "reference"]
FORMS = {"uint32": random_bits, "float32": random_uniform}
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


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("variant", FAST_VARIANTS)
def test_variant_has_the_bits_of_the_reference(variant, dtype):
    sizes = (1, 5, 4097) if variant == "triton" else SIZES  # the interpreter is slow
    for name in NAMES:
        for size in sizes:
            for offset in OFFSETS:
                guarded = Guarded(size, np.dtype(dtype), offset=1)
                out = FORMS[dtype](size, **name, offset=offset, out=guarded.array, variant=variant)
                want = FORMS[dtype](size, **name, offset=offset, variant="reference")
                assert out is guarded.array
                assert out.tobytes() == want.tobytes(), (name, size, offset)
                guarded.check()


@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_pieces_of_a_stream_are_the_stream(variant):
    whole = random_bits(1000, 11, round=1, variant=variant)
    cuts = [0, 1, 4, 7, 130, 131, 600, 1000]  # within blocks, on their borders, vectors apart
    pieces = [
        random_bits(b - a, 11, round=1, offset=a, variant=variant)
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
from flcore.ops import random_bits, random_uniform
for make in (random_bits, random_uniform):
    for offset in (0, 1, 2**33 + 2):
        out = make(100_003, 9, round=1, tensor=2, client=3, offset=offset)
        print(hashlib.sha256(out.tobytes()).hexdigest())
"""


def test_instruction_sets_give_identical_bits():
    printed = outputs_per_level(LEVELS_SCRIPT)
    assert len(printed) >= 1 and len(set(printed.values())) == 1, printed.keys()


def test_thread_counts_give_identical_bits():
    results = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        results.add(random_uniform(300_001, 4, offset=1).tobytes())
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


@pytest.mark.parametrize("word", ["seed", "round", "tensor", "client"])
def test_neighbouring_streams_are_uncorrelated(word):
    name = {"seed": 1, "round": 1, "tensor": 1, "client": 1}
    x = random_uniform(1 << 18, **name).astype(np.float64)
    for step in (1, 2, 1 << 16):
        y = random_uniform(1 << 18, **{**name, word: 1 + step}).astype(np.float64)
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(x.size)


def test_neighbours_within_a_stream_are_uncorrelated():
    x = random_uniform(1 << 18, 6).astype(np.float64)
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
