"""Sizes of low-bit weights, scales in 8 bits, NVFP4 and Q4_K, schemes, the page about all of it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from flcore.errors import CheckpointError, DTypeError, InvalidInputError, NonFiniteError
from flcore.quantization import (
    QuantizedTensor,
    Scheme,
    from_ggml_q4_k,
    from_nvfp4,
    quantize,
    quantize_nvfp4,
)
from flcore.quantization._scheme import PRESETS
from flcore.reference import double_quant, nvfp4
from flcore.reference import weight_quant as wq
from support import ROOT

V = [0.9, -0.3, 2.6, 0.05, -1.7, 0.61]


@pytest.fixture(scope="module")
def normal():
    return np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)


def relative_error(w, scheme) -> float:
    return float(np.linalg.norm(quantize(w, scheme).dequantize() - w) / np.linalg.norm(w))


# ---- bits a weight -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (Scheme.of("int4"), 4.125), (Scheme.of("int4-asym"), 4.1875),
        (Scheme.of("int4-float-zero", group=32), 5.0), (Scheme.of("q4_0"), 4.5),
        (Scheme.of("nf4"), 4.5), (Scheme.of("nf4", double_quant=True), 4.127),
        (Scheme.of("int3"), 3.125), (Scheme.of("mxfp4"), 4.5), (Scheme.of("int8"), 8.008),
    ],
)  # fmt: skip
def test_bits_a_weight(normal, scheme, bits):
    assert quantize(normal, scheme).bits_per_weight == pytest.approx(bits, abs=2e-3)
    if scheme.group > 0:
        assert scheme.bits_per_weight == pytest.approx(bits, abs=2e-3)


# ---- double quantisation -----------------------------------------------------------------------


def test_the_256_levels_of_scales():
    """A sign, up to 6 zeros after the point, a linear fraction."""
    levels = double_quant.dynamic_levels()
    assert levels.shape == (256,) and (np.diff(levels) > 0).all()
    assert levels[-1] == 1 and 0 in levels and len(np.unique(levels)) == 256
    np.testing.assert_allclose(levels[[0, -2]], [-0.99296875, 0.99296875], rtol=1e-6)
    assert np.isclose(levels, 0.55e-6).any() and np.isclose(levels, 0.325e-5).any()


def test_double_quantisation(normal):
    plain, double = quantize(normal, "nf4"), quantize(normal, Scheme.of("nf4", double_quant=True))
    np.testing.assert_array_equal(plain.codes, double.codes)  # formed with the scales themselves
    blocks = np.repeat(double.arrays["scale_absmax"], 256).reshape(plain.scales.shape)
    gap = np.diff(double_quant.dynamic_levels()).max() / 2
    assert (np.abs(double.scales - plain.scales) <= gap * blocks * (1 + 1e-5)).all()
    assert relative_error(normal, double.scheme) < relative_error(normal, "nf4") * 1.002
    full = double.dequantize()
    tiled = double.tiled()
    np.testing.assert_array_equal(tiled.dequantize(), full)
    back = tiled.to_layout("rows")
    assert set(back.arrays) == {"codes", "scale_codes", "scale_absmax", "scale_offset"}
    np.testing.assert_array_equal(back.dequantize(), full)
    np.testing.assert_array_equal(double.rows([5, 2]).dequantize(), full[[5, 2]])
    again = QuantizedTensor.from_parts(double.shape, double.scheme, **double.arrays)
    np.testing.assert_array_equal(again.dequantize(), full)
    with pytest.raises(InvalidInputError, match=r"^scale_absmax: expected shape"):
        QuantizedTensor.from_parts(
            double.shape,
            double.scheme,
            **{**double.arrays, "scale_absmax": np.zeros(2, np.float32)},
        )


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 64), (5, 7000)])
def test_double_quantisation_of_any_size(shape):
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    made = quantize(w, Scheme.of("nf4", double_quant=True), layout="tile16")
    assert np.isfinite(made.dequantize()).all()
    one = np.full(shape, 0.25, np.float32)  # scales that are all equal come back exactly
    np.testing.assert_array_equal(
        quantize(one, Scheme.of("nf4", double_quant=True)).dequantize(), one
    )


# ---- schemes -----------------------------------------------------------------------------------


def test_every_preset_makes_a_weight(normal):
    for name in PRESETS:
        made = quantize(normal[:3, :70], name)
        assert made.scheme == Scheme.of(name) and 0 < relative_error(normal, name) < 0.5


@pytest.mark.parametrize(
    ("fields", "match", "error"),
    [
        ({"bits": 5}, "^bits: ", InvalidInputError),
        ({"bits": "4"}, "^bits: ", DTypeError),
        ({"group": 24}, "^group: ", InvalidInputError),
        ({"group": 0}, "^group: ", InvalidInputError),
        ({"group": 1.5}, "^group: ", DTypeError),
        ({"kind": "affine"}, "^kind: ", InvalidInputError),
        ({"scale_dtype": "float64"}, "^scale_dtype: ", InvalidInputError),
        ({"search": "grid"}, "^search: ", InvalidInputError),
        ({"scope": "tensor"}, "^group: ", InvalidInputError),
        ({"rule": "min_max"}, "^rule: ", InvalidInputError),
        ({"bits": 8, "rule": "q4_0"}, "^rule: ", InvalidInputError),
        ({"codebook": "nf4"}, "^codebook: ", InvalidInputError),
        ({"kind": "codebook", "codebook": "nf5"}, "^codebook: ", InvalidInputError),
        ({"kind": "codebook", "codebook": (1.0, 2.0)}, "^codebook: ", InvalidInputError),
        ({"kind": "codebook", "codebook": ("a",) * 16}, "^codebook: ", DTypeError),
        ({"kind": "codebook", "codebook": (0.0,) * 16}, "^codebook: ", InvalidInputError),
        ({"kind": "codebook", "bits": 3}, "^bits: ", InvalidInputError),
        ({"kind": "fp8"}, "^bits: ", InvalidInputError),
        ({"kind": "fp8", "bits": 8, "codebook": "e3m4"}, "^codebook: ", InvalidInputError),
        ({"kind": "codebook", "rule": "floor"}, "^scale_dtype: ", InvalidInputError),
        ({"double_quant": True}, "^double_quant: ", InvalidInputError),
    ],
)
def test_bad_schemes(fields, match, error):
    with pytest.raises(error, match=match):
        Scheme(**fields)


def test_bad_names():
    for bad, error in (("int5", InvalidInputError), (4, DTypeError)):
        with pytest.raises(error, match=r"^scheme: "):
            Scheme.of(bad)
    with pytest.raises(InvalidInputError, match=r"^scheme: no field size"):
        Scheme.of("int4", size=3)


# ---- scales of scales --------------------------------------------------------------------------


def test_nvfp4_by_hand():
    one = quantize_nvfp4(np.float32([V]), two_levels=False)
    assert one.scales.tolist() == [[0.4375]]
    np.testing.assert_array_equal(
        one.dequantize(), np.float32([[0.875, -0.21875, 2.625, 0, -1.75, 0.65625]])
    )
    two = quantize_nvfp4(np.float32([V]))
    np.testing.assert_allclose(two.scales, [[0.000967262 * 448]], rtol=1e-6)
    np.testing.assert_allclose(
        two.dequantize(), [[0.866667, -0.216667, 2.6, 0, -1.733333, 0.65]], atol=1e-6
    )


def test_nvfp4_of_many_blocks(normal):
    made = quantize_nvfp4(normal)
    error = np.linalg.norm(made.dequantize() - normal) / np.linalg.norm(normal)
    assert error == pytest.approx(0.095, rel=0.03)
    assert not quantize_nvfp4(np.zeros((2, 20), np.float32)).dequantize().any()
    with pytest.raises(NonFiniteError, match=r"^w: "):
        quantize_nvfp4(np.float32([[np.nan]]))
    q, scale_codes, t = nvfp4.quantize(normal[:5, :50])
    again = from_nvfp4(wq.pack_rows(q, 4), scale_codes, t, k=50)
    np.testing.assert_array_equal(again.dequantize(), quantize_nvfp4(normal[:5, :50]).dequantize())
    scale_codes[0, 0] = 0x7F
    with pytest.raises(CheckpointError, match=r"^scales: "):
        from_nvfp4(wq.pack_rows(q, 4), scale_codes, t, k=50)
    with pytest.raises(CheckpointError, match=r"^packed: "):
        from_nvfp4(wq.pack_rows(q, 4), scale_codes, t, k=52)
    with pytest.raises(CheckpointError, match=r"^tensor_scale: "):
        from_nvfp4(wq.pack_rows(q, 4), scale_codes & 0x3F, np.inf, k=50)


def test_q4_k_block_by_block():
    """Bytes put together field by field, as the format is described."""
    rng = np.random.default_rng(0)
    blocks, expected = [], []
    for _ in range(6):
        d, dmin = np.float16(rng.uniform(0.001, 0.1, 2))
        sc, m = rng.integers(0, 64, (2, 8))
        q = rng.integers(0, 16, 256)
        packed = np.zeros(12, np.uint8)
        for j in range(4):
            packed[j] = sc[j] | (sc[j + 4] >> 4) << 6
            packed[j + 4] = m[j] | (m[j + 4] >> 4) << 6
            packed[j + 8] = (sc[j + 4] & 15) | (m[j + 4] & 15) << 4
        codes = [q[64 * j + i] | q[64 * j + 32 + i] << 4 for j in range(4) for i in range(32)]
        blocks.append(np.array([d, dmin], "<f2").tobytes() + packed.tobytes() + bytes(codes))
        group = np.arange(256) // 32
        expected.append(float(d) * sc[group] * q - float(dmin) * m[group])
    raw = np.frombuffer(b"".join(blocks), np.uint8)
    made = from_ggml_q4_k(raw, (3, 512))
    want = np.array(expected).reshape(3, 512)
    np.testing.assert_allclose(made.dequantize(), want, rtol=3e-7, atol=3e-7)
    np.testing.assert_array_equal(made.tiled().dequantize(), made.dequantize())
    for bad, shape, error in (
        (raw[:-1], (3, 512), CheckpointError),
        (raw, (3, 500), InvalidInputError),
        (raw.astype(np.int8), (3, 512), DTypeError),
        (np.full(144, 0xFF, np.uint8), (1, 256), CheckpointError),
    ):
        with pytest.raises(error):
            from_ggml_q4_k(bad, shape)


def test_page_on_quantization_runs(tmp_path, monkeypatch):
    """Its blocks go on from each other."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "quantization.md").read_text()
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/quantization.md", "exec"), names)
