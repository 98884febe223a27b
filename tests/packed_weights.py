"""Packed weights for the tests of products with them."""

from __future__ import annotations

import numpy as np

from flcore.quantization import QuantizedTensor, Scheme, quantize
from flcore.reference import weight_quant as wq
from support import EPS, np_dtype

__all__ = ["HALF", "SCHEMES", "assert_columns", "numbers", "step", "weight", "whole_weight"]

HALF = {name: eps / 2 for name, eps in EPS.items()}  # what rounding costs, relative
SCHEMES = {
    "int2": Scheme.of("int2"),
    "int2-symmetric": Scheme(bits=2, group=32),
    "int3": Scheme.of("int3"),
    "int3-16": Scheme.of("int3-asym", group=16),
    "int3-asym": Scheme.of("int3-asym", group=32),
    "int4": Scheme.of("int4"),
    "int4-asym": Scheme.of("int4-asym", scale_dtype="bfloat16"),
    "int4-48": Scheme(bits=4, group=48, kind="integer_zero", scale_dtype="float32"),
    "int4-row": Scheme(bits=4, group=-1),
    "int4-tensor": Scheme(bits=4, group=-1, scope="tensor"),
    "int8": Scheme.of("int8"),
    "int8-16": Scheme.of("int8", group=16),
    "int8-asym": Scheme.of("int8-asym", group=64),
    "float-zero": Scheme.of("int4-float-zero"),
    "float-zero-8": Scheme.of("int4-float-zero", bits=8, group=32),
    "nf4": Scheme.of("nf4"),
    "mxfp4": Scheme.of("mxfp4"),
    "e4m3": Scheme.of("mxfp8"),
    "e5m2": Scheme.of("fp8-e5m2"),
}


def weight(rng: np.random.Generator, n: int, k: int, scheme: Scheme | str) -> QuantizedTensor:
    return quantize(rng.standard_normal((n, k)).astype(np.float32), scheme)


def whole_weight(q: np.ndarray, bits: int, zeros: np.ndarray | None = None) -> QuantizedTensor:
    """Weight of the integers q - Z: scale 1."""
    kind = "symmetric" if zeros is None else "integer_zero"
    scheme = Scheme(bits=bits, group=-1, kind=kind, scale_dtype="float32")
    ones = np.ones((len(q), 1), np.float32)
    return QuantizedTensor.from_parts(q.shape, scheme, wq.pack_rows(q, bits), ones, zeros)


def numbers(x: np.ndarray, w: QuantizedTensor) -> np.ndarray:
    """Scales or floating zeros of the layout "rows" for each weight, float64 (n, k)."""
    x = x.view(np_dtype("bfloat16")) if x.dtype == np.uint16 else x
    return wq.spread(x.astype(np.float64), w.shape[1], w.group)


def step(w: QuantizedTensor) -> np.ndarray:
    """Scales (n, k) of a weight of integers, 0 for others."""
    if w.scheme.kind in ("codebook", "fp8"):
        return np.zeros(w.shape)
    return np.abs(numbers(w.to_layout("rows").scales, w))


def assert_columns(got: np.ndarray, want: np.ndarray, w: QuantizedTensor) -> None:
    """The same values; levels of a codebook beside bfloat16 may have been rounded to it."""
    if w.scheme.kind == "codebook" and want.dtype.name == "bfloat16":
        got, want = got.astype(np.float32), want.astype(np.float32)
        np.testing.assert_allclose(got, want, rtol=3 * 2.0**-8, atol=0)
    else:
        np.testing.assert_array_equal(got, want)
