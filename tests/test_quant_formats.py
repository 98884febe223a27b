"""Low-bit formats against numbers worked by hand, error bounds and the table of relative errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flcore.quantization import (
    Scheme,
    quantize,
)
from flcore.reference import weight_quant as wq
from flcore.reference import weight_rules as rules
from flcore.reference.weight_rules import Rule

V = [0.9, -0.3, 2.6, 0.05, -1.7, 0.61]


def by_rule(w, rule: Rule):
    """Codes, scale, zero and values of one group, in float64 throughout."""
    rule = replace(rule, scale_dtype="float64")
    q, s, z = rules.quantize(np.array([w], np.float64), rule)
    values = wq.dequantize(
        q, s, z, bits=rule.bits, kind=rule.kind, group=rule.group, table=rule.table
    )
    return q[0].tolist(), s[0, 0], None if z is None else z[0, 0], values[0]


def min_max(kind=wq.INT, **fields) -> Rule:
    return Rule(4, kind, 16, "min_max", **fields)


# ---- numbers worked by hand --------------------------------------------------------------------


def test_integer_zero_by_hand():
    q, s, z, values = by_rule([0.10, -0.35, 0.20, 0.05], min_max())
    np.testing.assert_allclose(s, 0.0366667, atol=5e-8)
    assert z == 10 and q == [13, 0, 15, 11]
    np.testing.assert_allclose(values, [0.11, -0.366667, 0.183333, 0.036667], atol=1e-6)
    q, s, z, values = by_rule([1, -0.5, 0.25, 0.75], min_max())
    assert z == 5 and q == [15, 0, 7, 13]  # 0.25 / 0.1 = 2.5 rounds to 2
    np.testing.assert_allclose([s, *values], [0.1, 1, -0.5, 0.2, 0.8], rtol=1e-12)


def test_a_group_of_one_sign():
    """Without 0 in the range the zero is cut off and the group flattens."""
    w = [1, 1.3, 1.7, 2]
    q, _, z, values = by_rule(w, min_max(force_zero=False))
    assert z == 0 and q == [15, 15, 15, 15]
    np.testing.assert_allclose(values, [1, 1, 1, 1], rtol=1e-6)
    q, s, z, values = by_rule(w, min_max())
    np.testing.assert_allclose(s, 0.13333, atol=5e-6)
    assert z == 0 and q == [8, 10, 13, 15]
    np.testing.assert_allclose(values, [1.0667, 1.3333, 1.7333, 2], atol=5e-5)
    q, _, zero, values = by_rule(w, min_max(wq.FLOAT_ZERO, force_zero=False))
    np.testing.assert_allclose(zero, 1 + 8 / 15, rtol=1e-6)
    # 1.3 and 1.7 lie 4.5 and 10.5 steps above 1: ties, which rounding errors decide
    assert q[0] == 0 and q[1] in (4, 5) and q[2] in (10, 11) and q[3] == 15
    assert np.abs(values - w).max() <= 1 / 30 * (1 + 1e-9)
    assert quantize(np.float32([w]), "int4-asym").scheme.force_zero
    flat = quantize(np.float32([w]), Scheme.of("awq")).dequantize()
    np.testing.assert_allclose(flat, [[1, 1, 1, 1]], rtol=1e-3)


def test_awq_flattens_small_weights():
    w = np.float32([[3e-6, -2e-6, 1e-6, 0]])
    scheme = Scheme.of("awq", scale_dtype="float32")
    np.testing.assert_allclose(quantize(w, scheme).scales, [[1e-5 / 15]], rtol=1e-6)
    kept = quantize(w, Scheme.of("int4-asym", scale_dtype="float32")).dequantize()
    assert np.abs(kept - w).max() < 2e-7


def test_q4_0_by_hand():
    rule = Rule(4, wq.INT, 16, "q4_0")
    q, s, _, values = by_rule([0.10, -0.35, 0.20, 0.05], rule)
    assert q == [10, 0, 13, 9]
    np.testing.assert_allclose([s, *values], [0.04375, 0.0875, -0.35, 0.21875, 0.04375], rtol=1e-6)
    q, s, _, values = by_rule([1, -0.5, 0.25, 0.75], rule)
    assert s == -0.125 and q == [0, 12, 6, 2]
    np.testing.assert_array_equal(values, [1, -0.5, 0.25, 0.75])
    found = quantize(np.float32([[1, -0.5, 0.25, 0.75]]), "q4_0")
    np.testing.assert_array_equal(found.dequantize(), [[1, -0.5, 0.25, 0.75]])


def test_q8_0_rounds_halves_away():
    w = np.array([127, 0.5, -0.5, 1.5, -1.5, 2.49], np.float64)
    q, s, _, _ = by_rule(w, Rule(8, wq.INT, 16, "q8_0"))
    assert s == 1 and np.array(q).tolist() == (np.array([127, 1, -1, 2, -2, 2]) + 128).tolist()
    q, _, _, _ = by_rule(w, Rule(8, wq.INT, 16, "narrow"))
    assert (np.array(q) - 128).tolist() == [127, 0, 0, 2, -2, 2]


def test_symmetric_by_hand():
    """Marlin: the largest value is off by half a step; int8: it is exact, and -128 is not used."""
    q, s, _, values = by_rule([0.75, -0.75, 0.1, 0], Rule(4, wq.INT, 16, "centred"))
    assert q == [15, 0, 9, 8]  # -7.5 and 7.5 round to -8 and 8, and 8 is cut to 7
    np.testing.assert_allclose([s, *values], [0.1, 0.7, -0.8, 0.1, 0], rtol=1e-6)
    q, s, _, values = by_rule([-1.27, 1.27, 0.014], Rule(8, wq.INT, 16, "narrow"))
    assert q == [1, 255, 129]
    np.testing.assert_allclose([s, *values], [0.01, -1.27, 1.27, 0.01], rtol=1e-6)


def test_microscaling_by_hand():
    w = np.float32([V])
    for rule, scale, values in (
        ("floor", 0.5, [1, -0.25, 3, 0, -1.5, 0.5]),
        ("ceil", 1.0, [1, -0.5, 3, 0, -1.5, 0.5]),
    ):
        made = quantize(w, Scheme.of("mxfp4", rule=rule, scale_dtype="float32"))
        assert made.scales.tolist() == [[scale]]
        np.testing.assert_array_equal(made.dequantize(), [values])
        as_bfloat16 = quantize(w, Scheme.of("mxfp4", rule=rule))  # powers of two are exact
        np.testing.assert_array_equal(as_bfloat16.dequantize(), [values])


@pytest.mark.parametrize(
    ("rule", "top", "exponent"),
    [
        ("floor", 7.9, 0), ("floor", 8.0, 1), ("ceil", 4.0, 0), ("ceil", 4.1, 1), ("ceil", 8.0, 1),
        ("rceil", 6.0, 0), ("rceil", 6.1, 1), ("rceil", 3.0, -1), ("even", 6.9, 0),
        ("even", 7.0, 1),
    ],
)  # fmt: skip
def test_powers_of_two(rule, top, exponent):
    """Exponent of the scale for a largest value; e2m1 reaches 6 = 1.5 * 4."""
    for shift in (0, -30, 40):
        w = np.float32([[np.ldexp(top, shift), 0]])
        made = quantize(w, Scheme.of("mxfp4", rule=rule, scale_dtype="float32"))
        assert made.scales.tolist() == [[2.0 ** (exponent + shift)]]
        fp8 = quantize(w * 64, Scheme.of("mxfp8", rule=rule, scale_dtype="float32"))
        if rule in ("floor", "ceil"):  # e4m3: emax 8
            assert fp8.scales.tolist() == [[2.0 ** (exponent + shift)]]


def test_e2m1_ties_go_to_even_codes():
    halves = np.float32([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -2.5, -5]])
    scheme = Scheme.of("mxfp4", scale_dtype="float32")
    np.testing.assert_array_equal(
        quantize(halves, scheme).dequantize(), [[0, 1, 1, 2, 2, 4, 4, 6, 0, -2, -4]]
    )


def test_nf4_by_hand():
    made = quantize(np.float32([V]), "nf4")
    assert wq.unpack_rows(made.codes, 6, 4)[0].tolist() == [11, 6, 15, 7, 1, 10]
    np.testing.assert_allclose(
        made.dequantize(), [[0.87858, -0.23673, 2.6, 0, -1.810101, 0.639892]], atol=5e-6
    )
    gaps = np.diff(np.sort(wq.CODEBOOKS["nf4"]))
    np.testing.assert_allclose(gaps.max(), 0.303807, atol=5e-7)


def test_fp4_has_the_order_of_bitsandbytes():
    levels = [0, 0.005208333, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25]
    np.testing.assert_allclose(wq.CODEBOOKS["fp4"][:8], levels, atol=5e-5)
    np.testing.assert_array_equal(wq.CODEBOOKS["fp4"][8:], -wq.CODEBOOKS["fp4"][:8])
    w = np.float32([[1, -1 / 2, 1 / 3, 0.66, -0.17, 0.2501, 0.0052]])
    found = wq.unpack_rows(quantize(w, "fp4").codes, 7, 4)
    assert found[0].tolist() == [3, 13, 4, 2, 14, 7, 1]


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_fp8_is_the_cast_of_ml_dtypes(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = np.dtype(ml_dtypes.float8_e4m3fn if name == "e4m3" else ml_dtypes.float8_e5m2)
    top = float(ml_dtypes.finfo(kind).max)
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((50, 64)) * 2.0 ** rng.uniform(-25, 8, (50, 64))).astype(np.float32)
    w = np.clip(w, -top, top)
    w[:, 0] = top  # the scale is 1
    w[:, 1] = [0.0, -0.0] * 25
    made = quantize(w, Scheme.of("fp8", codebook=name))
    np.testing.assert_array_equal(made.scales, np.ones((50, 1)))
    np.testing.assert_array_equal(made.codes, w.astype(kind).view(np.uint8))
    np.testing.assert_array_equal(made.dequantize(), w.astype(kind).astype(np.float32))


def test_words_of_the_codes_1_to_8():
    packed = wq.pack_rows(np.arange(1, 9, dtype=np.uint8)[None], 4)
    assert packed.view("<u4")[0, 0] == 0x87654321
    assert packed.tobytes() == bytes([0x21, 0x43, 0x65, 0x87])


# ---- bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", wq.BITS)
@pytest.mark.parametrize("kind", ["symmetric", "integer_zero", "float_zero"])
def test_errors_stay_below_half_a_step(bits, kind):
    rng = np.random.default_rng(bits)
    w = (rng.standard_normal((32, 192)) + rng.uniform(-4, 4, (32, 1))).astype(np.float32)
    scheme = Scheme(bits=bits, group=64, kind=kind, scale_dtype="float32")
    made = quantize(w, scheme)
    error = np.abs(made.dequantize("float64") - w).reshape(32, 3, 64).max(axis=-1)
    assert (error <= made.scales / 2 * (1 + 1e-4)).all()


def test_nf4_and_fp8_bounds():
    w = np.random.default_rng(1).standard_normal((32, 256)).astype(np.float32)
    made = quantize(w, "nf4")
    error = np.abs(made.dequantize("float64") - w).reshape(32, 4, 64).max(axis=-1)
    assert (error <= 0.1519045 * made.scales).all()
    made = quantize(w, "fp8")
    error = np.abs(made.dequantize("float64") - w)
    assert (error <= np.maximum(np.abs(w) / 16, made.scales * 2.0**-10) * (1 + 1e-6)).all()


ERRORS = {  # relative Frobenius errors that the formats are known to have on a normal distribution
    "int8": (Scheme.of("int8-asym"), 0.0083),
    "int4 g32": (Scheme.of("int4-asym", group=32), 0.081),
    "q4_0": (Scheme.of("q4_0"), 0.086),
    "nf4": (Scheme.of("nf4"), 0.092),
    "nvfp4": (Scheme(group=16, kind="codebook", codebook="e2m1", scale_dtype="float32"), 0.094),
    "int4 g128": (Scheme.of("int4-asym"), 0.101),
    "mxfp4 floor": (Scheme.of("mxfp4"), 0.114),
    "int3 g128": (Scheme.of("int3-asym"), 0.215),
    "int2 g64": (Scheme.of("int2"), 0.457),
}
MORE = {
    "mxfp4 rceil": (Scheme.of("mxfp4", rule="rceil"), 0.1157),
    "mxfp4 ceil": (Scheme.of("mxfp4", rule="ceil"), 0.1443),
}


@pytest.fixture(scope="module")
def normal():
    return np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)


def relative_error(w, scheme) -> float:
    return float(np.linalg.norm(quantize(w, scheme).dequantize() - w) / np.linalg.norm(w))


def test_relative_errors_on_a_normal_distribution(normal):
    found = {name: relative_error(normal, scheme) for name, (scheme, _) in ERRORS.items()}
    for name, (_, expected) in ERRORS.items():
        assert found[name] == pytest.approx(expected, rel=0.02), name
    assert list(found.values()) == sorted(found.values()), "the order of the formats"
    for name, (scheme, expected) in MORE.items():
        assert relative_error(normal, scheme) == pytest.approx(expected, rel=0.01), name


@pytest.mark.parametrize("name", ["int8-asym", "int4-asym", "int4-float-zero", "int3-asym"])
def test_uniform_errors_are_predicted(normal, name):
    made = quantize(normal, Scheme.of(name, scale_dtype="float32"))
    predicted = np.sqrt(np.mean(made.scales.astype(np.float64) ** 2) / 12)
    found = np.sqrt(np.mean((made.dequantize() - normal) ** 2))
    assert found == pytest.approx(predicted, rel=0.04)


@pytest.mark.parametrize("name", ["int4", "int3", "int2", "nf4", "mxfp4", "int8"])
def test_search_never_loses(normal, name):
    assert relative_error(normal, Scheme.of(name, search="mse")) < relative_error(normal, name)
