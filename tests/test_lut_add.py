"""Adding looked-up codes: every variant and level, any number of packets, lanes that widen."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops.lut_add import lut_add
from support import outputs_per_level

# The table of THC with 16 values on a grid of 30.
TABLE = [0, 3, 5, 7, 9, 11, 13, 14, 16, 17, 19, 21, 23, 25, 27, 30]
SIZES = (0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 129, 4097, 16_383, 16_384, 16_385, 40_001)
VARIANTS = ("cpu", "reference")


def packets(n, codes, bits, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, -(-codes * bits // 8), np.uint8) for _ in range(n)]


def test_every_byte_is_two_table_values():
    every = np.arange(256, dtype=np.uint8)
    for variant in VARIANTS:
        sums = lut_add([every], TABLE, bits=4, codes=512, variant=variant)
        assert sums.dtype == np.uint8
        assert sums[0::2].tolist() == [TABLE[b & 15] for b in range(256)]
        assert sums[1::2].tolist() == [TABLE[b >> 4] for b in range(256)]
        quarters = lut_add([every], [0, 11, 19, 30], bits=2, codes=1024, variant=variant)
        want = [[0, 11, 19, 30][(b >> s) & 3] for b in range(256) for s in (0, 2, 4, 6)]
        assert quarters.tolist() == want
    assert lut_add([np.array([0x10], np.uint8)], TABLE, bits=4, codes=2).tolist() == [0, 3]


@pytest.mark.parametrize("codes", SIZES)
@pytest.mark.parametrize(("bits", "table"), [(4, TABLE), (2, [0, 1, 2, 3]), (4, range(16))])
def test_equals_the_reference(codes, bits, table):
    for n in (0, 1, 3, 8, 9, 20):
        rows = packets(n, codes, bits, seed=n)
        for lanes in ("auto", "uint16", "uint32"):
            ours, want = (
                lut_add(rows, table, bits=bits, codes=codes, lanes=lanes, variant=v)
                for v in VARIANTS
            )
            assert ours.dtype == want.dtype and np.array_equal(ours, want), (n, lanes)


def test_lanes_widen_before_they_overflow():
    """30 times 8 fits in a byte, 30 times 9 does not; 16 bits take 2184 clients."""
    full = np.full(40, 255, np.uint8)
    for n, lanes in ((8, "uint8"), (9, "uint16"), (2184, "uint16"), (2185, "uint32")):
        sums = lut_add([full] * n, TABLE, bits=4, codes=80)
        assert sums.dtype == lanes and (sums == 30 * n).all()
    for n, lanes in ((9, "uint8"), (2185, "uint16")):
        for variant in VARIANTS:
            with pytest.raises(InvalidInputError, match=f"sums can reach {30 * n}"):
                lut_add([full] * n, TABLE, bits=4, codes=80, lanes=lanes, variant=variant)


def test_integer_weights():
    rows = packets(5, 1000, 4)
    weights = [1, 7, 8, 100, 255]
    single = [lut_add([x], TABLE, bits=4, codes=1000).astype(np.int64) for x in rows]
    want = sum(w * s for w, s in zip(weights, single, strict=True))
    for variant in VARIANTS:
        sums = lut_add(rows, TABLE, bits=4, codes=1000, weights=weights, variant=variant)
        assert sums.dtype == np.uint16 and np.array_equal(sums, want)
    wide = [0, *range(241, 255), 255]  # a weight of 2 no longer fits in a byte
    rows = packets(300, 70, 4)
    for variant in VARIANTS:
        sums = lut_add(rows, wide, bits=4, codes=70, weights=[2] * 300, variant=variant)
        want = 2 * sum(lut_add([x], wide, bits=4, codes=70).astype(np.int64) for x in rows)
        assert sums.dtype == np.uint32 and np.array_equal(sums, want)


def test_addresses_of_any_alignment_and_longer_buffers():
    buffer = np.random.default_rng(1).integers(0, 256, 500, np.uint8)
    rows = [buffer[i : i + 200 + i] for i in range(9)]
    read_only = buffer[::2]
    rows.append(read_only)
    copies = [x[:170].copy() for x in rows]
    got = lut_add(rows, TABLE, bits=4, codes=339)
    assert np.array_equal(got, lut_add(copies, TABLE, bits=4, codes=339, variant="reference"))


DIGESTS = """
import hashlib, numpy as np
from flcore.ops.lut_add import lut_add
rng = np.random.default_rng(2)
digest = hashlib.sha256()
for codes in (1, 65, 16_449, 50_000):
    for bits, g in ((4, 30), (2, 9)):
        rows = [rng.integers(0, 256, -(-codes * bits // 8), np.uint8) for _ in range(13)]
        table = np.linspace(0, g, 1 << bits).astype(int)
        for lanes in ("auto", "uint32"):
            digest.update(lut_add(rows, table, bits=bits, codes=codes, lanes=lanes).tobytes())
print(digest.hexdigest())
"""


def test_instruction_set_levels_give_identical_sums():
    printed = outputs_per_level(DIGESTS)
    assert len(set(printed.values())) == 1, printed


def test_thread_counts_give_identical_sums():
    rows = packets(11, 100_000, 4)
    found = []
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        found.append(lut_add(rows, TABLE, bits=4, codes=100_000))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bits": 3}, InvalidInputError, "bits: expected 2 or 4"),
        ({"codes": -1}, InvalidInputError, "codes"),
        ({"codes": 9}, InvalidInputError, r"packets\[0\]: expected at least 5 bytes"),
        ({"table": [0] * 16}, InvalidInputError, "increasing"),
        ({"table": [*range(15), 256]}, InvalidInputError, "at most 255"),
        ({"table": range(4)}, InvalidInputError, "expected 16 integers"),
        ({"table": np.linspace(0, 1, 16)}, InvalidInputError, "table"),
        ({"weights": [1]}, InvalidInputError, "weights: expected 2"),
        ({"weights": [1, 0]}, InvalidInputError, r"weights\[1\]: expected 1 to 255"),
        ({"weights": [1, 256]}, InvalidInputError, "weights"),
        ({"weights": [1, 1.5]}, DTypeError, r"weights\[1\]: expected an integer"),
        ({"weights": [1, True]}, DTypeError, "weights"),
        ({"lanes": "int8"}, InvalidInputError, "lanes: expected auto"),
        ({"packets": [np.zeros(4, np.int8)]}, DTypeError, r"packets\[0\]"),
        ({"packets": [b"1234"]}, DTypeError, "expected a 1-D uint8 array"),
    ],
)
def test_arguments_that_cannot_be_used(options, error, words):
    given = {"packets": packets(2, 8, 4), "table": TABLE, "bits": 4, "codes": 8, **options}
    with pytest.raises(error, match=words):
        lut_add(given.pop("packets"), given.pop("table"), **given)
