"""`QuantizedTensor`: parts that are checked, rows, copies, addresses, torch tensors."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from flcore.errors import DTypeError, InvalidInputError
from flcore.quantization import QuantizedTensor, Scheme, quantize
from support import HAS_TORCH


def weight(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def test_from_parts_checks_everything():
    w = weight(6, 40)
    made = quantize(w, "int4-asym")
    good = dict(made.arrays)
    again = QuantizedTensor.from_parts((6, 40), made.scheme, **good)
    np.testing.assert_array_equal(again.dequantize(), made.dequantize())

    def fails(error, match, shape=(6, 40), scheme=made.scheme, layout="rows", **changed):
        with pytest.raises(error, match=match):
            QuantizedTensor.from_parts(shape, scheme, **{**good, **changed}, layout=layout)

    fails(InvalidInputError, "^codes: expected shape", shape=(6, 41))
    fails(InvalidInputError, "^shape: ", shape=(6, -1))
    fails(InvalidInputError, "^shape: ", shape=6)
    fails(InvalidInputError, "^scheme: ", scheme="int5")
    fails(InvalidInputError, "^layout: ", layout="blocks")
    fails(DTypeError, "^codes: expected uint8", codes=good["codes"].astype(np.int8))
    fails(DTypeError, "^codes: expected an array", codes=[1])
    fails(DTypeError, "^scales: expected float16", scales=good["scales"].astype(np.float32))
    fails(InvalidInputError, "^scales: expected shape", scales=good["scales"][:3])
    fails(InvalidInputError, "^scales: expected finite", scales=good["scales"] * np.float16(np.nan))
    fails(InvalidInputError, "^zeros: expected 0 .. 15", zeros=good["zeros"] | 16)
    fails(DTypeError, "^zeros: ", zeros=None)
    fails(InvalidInputError, "^zeros: .* has none", scheme=Scheme.of("int4"))
    fails(InvalidInputError, "^scale_codes: ", scale_codes=good["codes"])
    e4m3 = quantize(w, "fp8")
    for byte in (0x7F, 0xFF):
        codes = e4m3.codes.copy()
        codes[5, 39] = byte
        with pytest.raises(InvalidInputError, match="no finite e4m3"):
            QuantizedTensor.from_parts((6, 40), e4m3.scheme, codes, e4m3.scales)


def test_rows_and_copies():
    w = weight(37, 50)
    for name in ("int4-asym", "int3", "nf4"):
        made = quantize(w, name, layout="tile16")
        full = made.dequantize()
        np.testing.assert_array_equal(made.rows([3, -1, 3]).dequantize(), full[[3, -1, 3]])
        np.testing.assert_array_equal(made.rows(slice(5, 20, 2)).dequantize(), full[5:20:2])
        assert made.rows([]).shape == (0, 50)
        made.kernel_args()
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert twin.kernel_args()["codes"] != made.kernel_args()["codes"]
            np.testing.assert_array_equal(twin.dequantize(), full)
    for bad, error in (([37], InvalidInputError), ([0.5], DTypeError), ([[1]], DTypeError)):
        with pytest.raises(error, match=r"^index: "):
            made.rows(bad)


def test_sizes_and_addresses():
    made = quantize(weight(33, 100), "int4-asym", layout="rows")
    assert made.nbytes == 33 * (50 + 2 + 1) and made.groups == 1 and made.group == 112
    assert made.bits_per_weight == 8 * 53 / 100
    args = made.kernel_args()
    tiled = made.tiled()
    assert args is made.kernel_args() and tiled is made.tiled()
    assert tiled.codes.shape == (3, 4, 256) and tiled.scales.shape == (3, 1, 16)
    assert args["codes"] == tiled.codes.ctypes.data and args["codes"] % 64 == 0
    assert args["zeros"] == tiled.zeros.ctypes.data and args["table"] == 0
    assert not tiled.scales.reshape(-1)[33:].any()
    assert (args["n"], args["k"], args["bits"], args["kind"], args["group"]) == (33, 100, 4, 0, 112)


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
def test_torch_tensors():
    import torch

    w = torch.randn(20, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in ("int4", "int4-float-zero", "nf4", "fp8", "int3-asym"):
        made = quantize(w, name)
        assert made.codes.dtype == torch.uint8 and made.device == "cpu"
        assert str(made.scales.dtype) == f"torch.{made.scheme.scale_dtype}"
        want = quantize(w.float().numpy(), name)
        np.testing.assert_array_equal(made.numpy().codes, want.codes)
        full = torch.from_numpy(want.dequantize())
        assert torch.equal(made.dequantize(), full)
        assert torch.equal(made.tiled().dequantize(torch.bfloat16), full.bfloat16())
        assert torch.equal(want.torch().to("cpu").dequantize("float16"), full.half())
        out = torch.empty(20, 70, dtype=torch.float16)
        assert made.dequantize(out=out) is out and torch.equal(out, full.half())
        assert torch.equal(made.rows(torch.tensor([4, 2])).dequantize(), full[[4, 2]])
        again = QuantizedTensor.from_parts((20, 70), made.scheme, **made.arrays)
        assert torch.equal(again.dequantize(), full)
        with pytest.raises(InvalidInputError, match="kind and device"):
            QuantizedTensor.from_parts(
                (20, 70), made.scheme, **{**want.arrays, "codes": made.codes}
            )
    with pytest.raises(DTypeError, match=r"^out: "):
        made.dequantize(out=np.empty((20, 70), np.float32))


def test_import_stays_without_torch():
    import subprocess
    import sys

    code = "import flcore.quantization, sys; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
