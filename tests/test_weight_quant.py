"""Low-bit weights: layouts by hand, every variant and level against the definition, errors."""

from __future__ import annotations

import re

import numpy as np
import pytest

from flcore import _native, _variants
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops.weight_quant import (
    LAYOUTS,
    dequantize_weight,
    quantize_weight,
    repack_weight,
)
from flcore.quantization import QuantizedTensor, Scheme, quantize
from flcore.quantization._scheme import PRESETS
from flcore.reference import weight_quant as wq
from flcore.reference import weight_rules as rules
from support import DTYPES, ROOT, np_dtype, outputs_per_level, unaligned

VARIANTS = list(_variants.available("quantize_weight"))
SHAPES = [
    (0, 7),
    (3, 0),
    (1, 1),
    (1, 16),
    (2, 31),
    (16, 32),
    (17, 33),
    (5, 100),
    (33, 130),
    (40, 257),
]
OWN = tuple(np.linspace(-2, 3, 16).tolist())
SCHEMES = {
    **{name: Scheme.of(name) for name in PRESETS},
    "int4-g16": Scheme.of("int4", group=16, scale_dtype="bfloat16"),
    "int4-row": Scheme.of("int4-asym", group=-1),
    "int2-sym": Scheme.of("int2", kind="symmetric"),
    "int3-float-zero": Scheme(bits=3, group=32, kind="float_zero", scale_dtype="float32"),
    "int8-float-zero": Scheme(bits=8, group=48, kind="float_zero", scale_dtype="float16"),
    "int8-g64": Scheme.of("int8-asym", group=64, force_zero=False),
    "own": Scheme.of("nf4", codebook=OWN, group=32),
    "mxfp4-ceil": Scheme.of("mxfp4", rule="ceil"),
    "mxfp4-rceil": Scheme.of("mxfp4", rule="rceil"),
    "mxfp4-even": Scheme.of("mxfp4", rule="even"),
    "mxfp8-e5m2": Scheme.of("mxfp8", codebook="e5m2", rule="even"),
    "tensor": Scheme.of("int8", scope="tensor"),
    "tensor-asym": Scheme.of("int8-asym", scope="tensor"),
    "tensor-q4_0": Scheme.of("q4_0", scope="tensor", group=-1),
    "tensor-nf4": Scheme.of("nf4", scope="tensor", group=-1),
}
SEARCHED = ["int4", "int4-asym", "int3-float-zero", "nf4", "mxfp4", "fp8", "q4_0", "q8_0", "tensor",
            "tensor-nf4"]  # fmt: skip


def weight(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def same_parts(one, other) -> None:
    for a, b, name in zip(one, other, ("codes", "scales", "zeros"), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_array_equal(a, b, err_msg=name)


# ---- layouts by hand ---------------------------------------------------------------------------


def test_rows_by_hand():
    """Codes 1 .. 8 in a row."""
    q = np.arange(1, 9, dtype=np.uint8)[None]
    assert wq.pack_rows(q, 8).tobytes().hex() == "0102030405060708"
    assert wq.pack_rows(q, 4).tobytes().hex() == "21436587"
    assert wq.pack_rows(np.uint8([[1, 2, 3, 0, 3]]), 2).tobytes().hex() == "3903"
    # 1, 2, 3, 4, 5, 6, 7, 0, 7: low bits 1 2 3 0 | 1 2 3 0 | 3, high bits 0 0 0 1 1 1 1 0 | 1
    odd = np.uint8([[1, 2, 3, 4, 5, 6, 7, 0, 7]])
    assert wq.pack_rows(odd, 3).tobytes().hex() == "3939037801"
    assert wq.row_bytes(9, 3) == 5


@pytest.mark.parametrize("bits", wq.BITS)
def test_tile16_is_what_its_description_says(bits):
    """Every code found where the description puts it, one by one."""
    n, k = 21, 70
    q = np.random.default_rng(bits).integers(0, 2**bits, (n, k)).astype(np.uint8)
    tiles = wq.pack_tile16(q, bits, pad=1)
    assert tiles.shape == (2, 3, 64 * bits)
    for row in range(32):
        for col in range(96):
            chunk = tiles[row // 16, col // 32]
            r, c, i = row % 16, col % 32, col % 4
            if bits == 8:
                got = chunk[64 * (c // 4) + 4 * r + i]
            elif bits == 4:
                got = chunk[64 * (c // 8) + 4 * r + i] >> (4 * (c % 8 // 4)) & 15
            else:
                got = chunk[64 * (c // 16) + 4 * r + i] >> (2 * (c % 16 // 4)) & 3
                if bits == 3:
                    got |= (chunk[128 + 4 * r + i] >> (c // 4) & 1) << 2
            assert got == (q[row, col] if row < n and col < k else 1)


@pytest.mark.parametrize("bits", wq.BITS)
@pytest.mark.parametrize("k", [1, 7, 8, 9, 31, 32, 33, 65])
def test_unpack_undoes_pack(bits, k):
    """All codes, all tails; bits beyond k are 0."""
    n = 2**bits + 3
    q = ((np.arange(n)[:, None] + np.arange(k)) % 2**bits).astype(np.uint8)
    rows = wq.pack_rows(q, bits)
    assert rows.shape == (n, wq.row_bytes(k, bits))
    np.testing.assert_array_equal(wq.unpack_rows(rows, k, bits), q)
    np.testing.assert_array_equal(wq.unpack_tile16(wq.pack_tile16(q, bits, 1), n, k, bits), q)
    longer = np.pad(q, ((0, 0), (0, 8)))  # with codes of 0
    planes = [(rows, bits, 0)] if bits != 3 else [(rows[:, : -(-k // 4)], 2, 0)]
    planes += [(rows[:, -(-k // 4) :], 1, 2)] if bits == 3 else []
    for plane, width, shift in planes:
        padded = wq.pack_rows(longer >> shift & (2**width - 1), width)
        np.testing.assert_array_equal(padded[:, : plane.shape[1]], plane)
    groups = np.arange(n * 3, dtype=np.float32).reshape(n, 3)
    np.testing.assert_array_equal(wq.untile_groups(wq.tile_groups(groups), n), groups)


# ---- variants against the definition -----------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "tile16"])
@pytest.mark.parametrize("name", SCHEMES)
def test_kernel_has_the_bits_of_the_definition(name, layout):
    scheme = SCHEMES[name]
    for n, k in SHAPES:
        w = weight(n, k, n + k)
        want = quantize_weight(w, scheme, layout=layout, variant="reference")
        same_parts(quantize_weight(w, scheme, layout=layout, variant="cpu"), want)
        made = QuantizedTensor((n, k), scheme, layout, *want)
        for dtype in ("float64", "float32", "float16"):
            np.testing.assert_array_equal(
                dequantize_weight(made, dtype, variant="cpu"),
                dequantize_weight(made, dtype, variant="reference"),
            )
        other = "rows" if layout == "tile16" else "tile16"
        there = repack_weight(made, other, variant="cpu")
        same_parts(there, repack_weight(made, other, variant="reference"))
        moved = QuantizedTensor((n, k), scheme, other, *there)
        same_parts(repack_weight(moved, layout, variant="cpu"), want)


@pytest.mark.parametrize("name", SEARCHED)
def test_search_has_the_bits_of_the_definition(name):
    scheme = Scheme.of(SCHEMES[name], search="mse")
    for n, k in [(1, 1), (17, 33), (20, 300)]:
        w = weight(n, k, k) ** 3
        same_parts(
            quantize_weight(w, scheme, variant="cpu"),
            quantize_weight(w, scheme, variant="reference"),
        )


@pytest.mark.parametrize("name", SEARCHED)
def test_search_lowers_the_error_of_every_group(name):
    scheme = SCHEMES[name]
    w = weight(16, 256, 5) ** 3
    plain, searched = quantize(w, scheme), quantize(w, Scheme.of(scheme, search="mse"))
    errors = [(q.dequantize("float64") - w) ** 2 for q in (plain, searched)]
    whole = scheme.scope == "tensor"
    group = 256 if whole else plain.group
    sums = [e.reshape(-1, group).sum(axis=1) if not whole else e.sum() for e in errors]
    assert (sums[1] <= sums[0] * (1 + 1e-5)).all()
    if scheme.bits < 8:
        assert errors[1].sum() < errors[0].sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int4", "int4-float-zero", "nf4", "mxfp8", "int3-asym"])
def test_dtypes_and_odd_memory(name, dtype):
    w = weight(19, 77).astype(np_dtype(dtype))
    want = quantize_weight(w, SCHEMES[name], variant="reference")
    same_parts(quantize_weight(w, SCHEMES[name]), want)
    same_parts(quantize_weight(unaligned(w), SCHEMES[name]), want)
    same_parts(quantize_weight(np.asfortranarray(w), SCHEMES[name]), want)
    frozen = w.copy()
    frozen.flags.writeable = False
    same_parts(quantize_weight(frozen, SCHEMES[name]), want)
    codes, scales, zeros = (None if x is None else unaligned(x, x.itemsize) for x in want)
    odd = QuantizedTensor((19, 77), SCHEMES[name], "rows", codes, scales, zeros)
    made = QuantizedTensor((19, 77), SCHEMES[name], "rows", *want)
    out = np.empty((19, 77), np_dtype(dtype))
    assert dequantize_weight(odd, out=out) is out
    np.testing.assert_array_equal(
        out.astype(np.float64),
        dequantize_weight(made, out=out.copy(), variant="reference").astype(np.float64),
    )
    same_parts(repack_weight(odd, "tile16"), repack_weight(made, "tile16", variant="reference"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SCHEMES)
def test_extreme_values(name, variant):
    """Zeros, equal values, very small and large numbers: no NaN, no error beyond the rule."""
    scheme = SCHEMES[name]
    zero = QuantizedTensor(
        (2, 50),
        scheme,
        "rows",
        *quantize_weight(np.zeros((2, 50), np.float32), scheme, variant=variant),
    )
    assert not dequantize_weight(zero, variant=variant).any()
    if scheme.rule == "awq":
        return  # a range of at least 1e-5 flattens small weights, and 0 may lie outside
    for value in (1e-44, -3e-9, 0.7, -250.0):
        w = np.full((1, 48), value, np.float32)
        parts = quantize_weight(w, scheme, variant=variant)
        same_parts(parts, quantize_weight(w, scheme, variant="reference"))
        found = dequantize_weight(QuantizedTensor((1, 48), scheme, "rows", *parts), variant=variant)
        assert np.isfinite(found).all()
        if abs(value) > 0.1 and scheme.force_zero:
            np.testing.assert_allclose(found, w, rtol=0.35)


def test_same_bits_for_any_number_of_threads():
    w = weight(700, 400)
    for name in ("int4-asym", "nf4", "tensor", "int3"):
        found = []
        for threads in (1, 2, 3):
            with _native.num_threads(threads):
                made = quantize(w, Scheme.of(SCHEMES[name], search="mse"), layout="tile16")
                back = made.to_layout("rows")
                found.append((made.codes, made.scales, back.codes, made.dequantize()))
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                np.testing.assert_array_equal(a, b)


SCRIPT = """
import sys, zlib
sys.path.insert(0, {tests!r})
import numpy as np
from test_weight_quant import SCHEMES, SEARCHED, weight
from flcore.quantization import Scheme, quantize
for name, scheme in SCHEMES.items():
    for search in ("absmax", "mse") if name in SEARCHED else ("absmax",):
        w = weight(35, 333) ** 3
        made = quantize(w, Scheme.of(scheme, search=search), layout="tile16")
        back = made.to_layout("rows")
        parts = [made.codes, made.scales, back.codes, back.scales]
        parts += [made.dequantize(d) for d in ("float64", "float32", "float16")]
        if made.zeros is not None:
            parts += [made.zeros, back.zeros]
        print(name, search, [zlib.crc32(np.ascontiguousarray(p)) for p in parts])
"""


def test_same_bits_at_every_level():
    from pathlib import Path

    printed = outputs_per_level(SCRIPT.format(tests=str(Path(__file__).parent)))
    assert len(set(printed.values())) == 1
    assert len(next(iter(printed.values())).splitlines()) == len(SCHEMES) + len(SEARCHED)


def test_names_have_the_numbers_of_the_kernels():
    """The lists of rules and layouts are in the order of the enums."""
    header = (ROOT / "csrc" / "api.h").read_text()
    for prefix, names in (("WeightRule", rules.RULES), ("WeightLayout", LAYOUTS)):
        body = re.search(rf"enum {prefix} : int {{(.*?)}}", header, flags=re.S)[1]
        found = re.findall(r"WEIGHT_(\w+) = (\d+)", body)
        assert [(n.upper(), str(i)) for i, n in enumerate(names)] == found[:-1]


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["int8", "int4-asym", "nf4", "tensor", "q4_0"])
def test_nonfinite_weights_are_refused(name, variant):
    for bad in (np.nan, np.inf, -np.inf):
        w = weight(20, 40)
        w[17, 39] = bad
        with pytest.raises(NonFiniteError, match="w: expected finite"):
            quantize_weight(w, SCHEMES[name], variant=variant)
    with pytest.raises(NonFiniteError):
        quantize_weight(np.full((1, 4), 1e300), SCHEMES[name], variant=variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_scale_beyond_its_type_is_refused(variant):
    w = np.float32([[1e6, 0, 3e6, 0]])
    with pytest.raises(InvalidInputError, match="too large for scale_dtype float16"):
        quantize_weight(w, Scheme.of("int4"), variant=variant)
    with pytest.raises(InvalidInputError, match="too large"):
        quantize_weight(
            w + 1e6, Scheme.of("int4-float-zero", scale_dtype="float16"), variant=variant
        )
    quantize_weight(w, Scheme.of("int4", scale_dtype="bfloat16"), variant=variant)


def test_wrong_arguments():
    w = weight(4, 8)
    for bad, error in ((w[0], InvalidInputError), (w.astype(int), DTypeError), ([1.0], DTypeError)):
        with pytest.raises(error, match=r"^w: "):
            quantize(bad, "int4")
    with pytest.raises(InvalidInputError, match=r"^layout: "):
        quantize(w, "int4", layout="columns")
    made = quantize(w, "int4")
    with pytest.raises(InvalidInputError, match=r"^layout: "):
        made.to_layout("columns")
    with pytest.raises(DTypeError, match=r"^dtype: "):
        made.dequantize("int8")
    with pytest.raises(InvalidInputError, match=r"^out: "):
        made.dequantize(out=np.empty((8, 4), np.float32))
    with pytest.raises(InvalidInputError, match="contiguous"):
        made.dequantize(out=np.empty((8, 4), np.float32).T)
    with pytest.raises(DTypeError, match=r"^out: "):
        made.dequantize(out=np.empty((4, 8), np.int32))


def test_binding_checks_its_arguments():
    parts = [0, 0, 0, 0]
    for form in ([1, 1, 5, 0, 16, 1], [1, 1, 4, 9, 16, 1], [1, 1, 4, 0, 8, 1], [1, 1, 4, 0, 16, 0],
                 [-1, 1, 4, 0, 16, 1], [1, 1, 4, 1, 16, 1], [1, 1, 4, 2, 16, 1],
                 [1, 1, 4, 3, 16, 1]):  # fmt: skip
        with pytest.raises(InvalidInputError):
            _native.core.dequantize_weight(form, 0, parts, 0, 1, 1)
