"""`select`, `gram` and `combine` straight from packets: the bits of the same on decoded updates."""

from __future__ import annotations

import numpy as np
import pytest

from flcore import ops
from flcore.errors import InvalidInputError, NonFiniteError
from test_packet_rules import TOTAL, assert_same_bits, clients, decode, make, split


@pytest.mark.parametrize("op", ["median", "trimmed_mean", "near_median", "near_trimmed"])
def test_select(op):
    packets = clients(10, 2100)
    rows = [decode(p) for p in packets]
    options = {"f": 2, "keep": 7} if op != "median" else {"median": "lower"}
    expected = ops.select(rows, op, **options)
    assert_same_bits(ops.select(packets, op, **options), expected)
    np.testing.assert_allclose(
        ops.select(packets, op, variant="reference", **options), expected, rtol=1e-5, atol=1e-6
    )
    mix = np.random.default_rng(0).random((6, 10))
    mix[:, 3] = 0
    options = {"f": 1, "keep": 4} if op != "median" else {}
    assert_same_bits(
        ops.select(packets, op, mix=mix, **options), ops.select(rows, op, mix=mix, **options)
    )


@pytest.mark.parametrize("kind", ["norms", "distances", "products"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 3, 8, 13])
def test_gram(kind, precision, n):
    packets = clients(n, TOTAL)
    rows = [split(decode(p)) for p in packets]
    for per_layer in (False, True):
        options = {"kind": kind, "precision": precision, "per_layer": per_layer}
        got = ops.gram(packets, like=split(np.zeros(TOTAL, np.float32)), **options)
        expected = ops.gram(rows, **options)
        for name in ("norms", "distances", "products"):
            a, b = getattr(got, name), getattr(expected, name)
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_array_equal(a, b)
    plain = ops.gram(packets, kind, precision="float64", variant="reference")
    np.testing.assert_allclose(ops.gram(packets, kind).norms, plain.norms, rtol=1e-5)


def test_gram_over_many_tiles_and_wide_blocks():
    """Rotated packets decode 2,048 coordinates at once, the sums go by 1,024."""
    packets = clients(6, 40_961, ["rotated", "uniform"])
    rows = [decode(p) for p in packets]
    np.testing.assert_array_equal(ops.gram(packets).distances, ops.gram(rows).distances)


def test_gram_reads_again_where_float32_does_not_do():
    values = np.full(3000, 1e25, np.float32)
    packets = [make("dense", values), make("dense", -values), make("sparse", values)]
    found = ops.gram(packets)
    assert found.precision == "float64" and found.nonfinite == ()
    np.testing.assert_array_equal(found.distances, ops.gram([decode(p) for p in packets]).distances)


@pytest.mark.parametrize("accumulate", ["float32", "float64", "reproducible"])
def test_combine(accumulate):
    packets = clients(10, 5003)
    rows = [decode(p) for p in packets]
    weights = [1, -2, 0, 0.1, 3, 1e-3, -0.7, 5, 0, 1]
    options = {"accumulate": accumulate, "divisor": 3.0}
    expected = ops.combine(rows, weights, **options)
    assert_same_bits(ops.combine(packets, weights, **options), expected)
    got = ops.combine(packets, weights, variant="reference", **options)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert_same_bits(ops.combine(packets, [0] * 10, **options), np.zeros(5003, np.float32))


def test_sums_that_overflow_are_an_error_and_leave_out_alone():
    packets = [make("dense", np.full(50, 3e38, np.float32))] * 3
    out = np.ones(50, np.float32)
    with pytest.raises(NonFiniteError, match="their sum overflows"):
        ops.combine(packets, [1, 1, 1], out=out)
    assert (out == 1).all()
    with pytest.raises(InvalidInputError, match="2\\^46"):
        ops.combine(packets, [1, 1, 1], accumulate="reproducible")
    assert np.isinf(ops.combine(packets, [1, 1, 1], nonfinite="propagate")).all()
    got = ops.combine(packets, [0.25] * 3, accumulate="float64")
    np.testing.assert_allclose(got, 2.25e38, rtol=1e-6)
