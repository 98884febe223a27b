"""Loaders of layouts in blocks of bytes: codes are laid out by plain loops and must come back."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.errors import CheckpointError, DTypeError, InvalidInputError
from flcore.quantization import from_bitsandbytes_nf4, from_ggml_q4_0, from_onnx_matmul_nbits
from flcore.reference import weight_quant as wq
from weight_layouts import ONE_TO_EIGHT, codes_of, draw, expected

# ---- ONNX Runtime --------------------------------------------------------------------------------


def ort_bytes(values, bits: int) -> list[int]:
    per = 8 // bits
    values = list(values) + [0] * (-len(values) % per)
    return [
        sum(int(values[per * i + j]) << (bits * j) for j in range(per))
        for i in range(len(values) // per)
    ]


def ort_parts(q, z, bits: int, block: int):
    n, k = q.shape
    count = -(-k // block)
    padded = np.zeros((n, count * block), np.uint8)
    padded[:, :k] = q
    codes = np.array(
        [
            [ort_bytes(row[g * block : (g + 1) * block], bits) for g in range(count)]
            for row in padded
        ],
        np.uint8,
    )
    return codes, np.array([ort_bytes(row, bits) for row in z], np.uint8)


def test_codes_1_to_8_in_bytes_of_onnx_runtime():
    assert bytes(ort_bytes(ONE_TO_EIGHT, 4)).hex() == "21436587"
    codes = np.frombuffer(bytes.fromhex("21436587") * 2, np.uint8).reshape(1, 1, 8)
    tensor = from_onnx_matmul_nbits(codes, np.ones((1, 1), np.float32), k=16, block_size=16)
    assert (codes_of(tensor) == np.tile(ONE_TO_EIGHT, 2)).all()
    assert (tensor.dequantize()[0, :3] == [-7, -6, -5]).all()  # zero is 8 when there is none


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("n", "k", "block"), [(3, 64, 32), (5, 100, 32), (2, 16, 128), (1, 80, 16)]
)
def test_onnx_matmul_nbits(n, k, block, bits, rng):
    q, s, z = draw(rng, n, k, block, bits, "float32")
    codes, zeros = ort_parts(q, z, bits, block)
    for scales, points in ((s, zeros), (s.reshape(-1), zeros.reshape(-1)), (s, z.astype("f4"))):
        tensor = from_onnx_matmul_nbits(codes, scales, points, k=k, bits=bits, block_size=block)
        np.testing.assert_array_equal(codes_of(tensor), q)
        np.testing.assert_array_equal(tensor.dequantize("float64"), expected(q, s, z, block))
    without = from_onnx_matmul_nbits(codes, s, k=k, bits=bits, block_size=block)
    middle = np.full_like(z, 2 ** (bits - 1))
    np.testing.assert_array_equal(without.dequantize("float64"), expected(q, s, middle, block))


def test_damaged_onnx(rng):
    q, s, z = draw(rng, 4, 64, 32, 4, "float32")
    codes, zeros = ort_parts(q, z, 4, 32)
    with pytest.raises(CheckpointError, match="codes: expected the shape"):
        from_onnx_matmul_nbits(codes, s, zeros, k=65, block_size=32)
    with pytest.raises(CheckpointError, match="scales: expected the shape"):
        from_onnx_matmul_nbits(codes, s[:3], zeros, k=64, block_size=32)
    with pytest.raises(CheckpointError, match="zero_points: expected the shape"):
        from_onnx_matmul_nbits(codes, s, zeros[:3], k=64, block_size=32)
    with pytest.raises(CheckpointError, match="zero_points: expected whole numbers"):
        from_onnx_matmul_nbits(codes, s, z + np.float32(0.5), k=64, block_size=32)
    with pytest.raises(DTypeError, match="codes: expected uint8, got int8"):
        from_onnx_matmul_nbits(codes.view(np.int8), s, zeros, k=64, block_size=32)
    with pytest.raises(InvalidInputError, match="block_size"):
        from_onnx_matmul_nbits(codes, s, zeros, k=64, block_size=24)
    with pytest.raises(InvalidInputError, match="k: expected a positive integer"):
        from_onnx_matmul_nbits(codes, s, zeros, k=0, block_size=32)


# ---- bitsandbytes --------------------------------------------------------------------------------


def bnb_bytes(flat) -> np.ndarray:
    return np.array(
        [int(flat[i]) << 4 | int(flat[i + 1]) for i in range(0, len(flat), 2)], np.uint8
    )


def test_codes_1_to_8_in_bytes_of_bitsandbytes():
    assert bytes(bnb_bytes(ONE_TO_EIGHT)).hex() == "12345678"


@pytest.mark.parametrize(
    ("n", "k", "block"), [(3, 128, 64), (4, 96, 64), (8, 32, 64), (5, 48, 64), (6, 192, 128)]
)
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_bitsandbytes(n, k, block, code, rng):
    q = rng.integers(0, 16, n * k).astype(np.uint8)
    absmax = rng.uniform(0.1, 2, -(-n * k // block)).astype(np.float32)
    levels = wq.CODEBOOKS[code].astype(np.float64)
    want = [levels[q[i]] * float(absmax[i // block]) for i in range(n * k)]
    for packed in (bnb_bytes(q), bnb_bytes(q)[:, None]):
        tensor = from_bitsandbytes_nf4(packed, absmax, (n, k), block_size=block, code=code)
        np.testing.assert_array_equal(tensor.dequantize("float64").reshape(-1), want)


def test_double_quantised_scales_of_bitsandbytes(rng):
    n, k = 300, 64
    q = rng.integers(0, 16, n * k).astype(np.uint8)
    nested = rng.integers(0, 256, n).astype(np.uint8)
    outer = np.float32([0.25, 0.5])
    book = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
    scales = [np.float32(book[nested[i]] * outer[i // 256]) + np.float32(1.5) for i in range(n)]
    tensor = from_bitsandbytes_nf4(
        bnb_bytes(q),
        nested,
        (n, k),
        code=wq.CODEBOOKS["nf4"].astype(np.float32),
        nested_absmax=outer,
        nested_code=book,
        nested_offset=1.5,
    )
    np.testing.assert_array_equal(tensor.scales[:, 0], np.float32(scales))
    with pytest.raises(InvalidInputError, match="pass nested_absmax"):
        from_bitsandbytes_nf4(bnb_bytes(q), nested, (n, k))
    with pytest.raises(CheckpointError, match="nested_absmax: expected the shape"):
        from_bitsandbytes_nf4(
            bnb_bytes(q), nested, (n, k), nested_absmax=outer[:1], nested_code=book
        )


def test_damaged_bitsandbytes(rng):
    q = rng.integers(0, 16, 4 * 128).astype(np.uint8)
    packed, absmax = bnb_bytes(q), np.ones(8, np.float32)
    with pytest.raises(CheckpointError, match="packed: expected the shape"):
        from_bitsandbytes_nf4(packed[:-1], absmax, (4, 128))
    with pytest.raises(CheckpointError, match="absmax: expected the shape"):
        from_bitsandbytes_nf4(packed, absmax[:-1], (4, 128))
    with pytest.raises(InvalidInputError, match="share no groups"):
        from_bitsandbytes_nf4(bnb_bytes(q[:280]), np.ones(5, np.float32), (7, 40))
    with pytest.raises(DTypeError, match="packed: expected uint8"):
        from_bitsandbytes_nf4(packed.astype(np.int32), absmax, (4, 128))
    with pytest.raises(InvalidInputError, match="even number"):
        from_bitsandbytes_nf4(packed, absmax, (3, 33))
    absmax[2] = np.nan
    with pytest.raises(CheckpointError, match="finite"):
        from_bitsandbytes_nf4(packed, absmax, (4, 128))


# ---- ggml ----------------------------------------------------------------------------------------


def test_q4_0_bytes_by_hand():
    """Codes j % 16 make the bytes 00 11 22 .. ff."""
    block = np.float16([-0.5]).tobytes() + bytes(0x11 * j for j in range(16))
    tensor = from_ggml_q4_0(np.frombuffer(block, np.uint8), (1, 32))
    np.testing.assert_array_equal(codes_of(tensor)[0], np.tile(np.arange(16), 2))
    np.testing.assert_array_equal(tensor.dequantize()[0, :3], [4, 3.5, 3])


@pytest.mark.parametrize(("n", "k"), [(1, 32), (3, 64), (5, 160)])
def test_ggml_q4_0(n, k, rng):
    q, d, _ = draw(rng, n, k, 32, 4)
    d[0, 0] = -d[0, 0]  # the scale has the sign of the largest value
    data = b""
    for i in range(n):
        for g in range(k // 32):
            row = q[i, 32 * g : 32 * g + 32]
            data += d[i, g].tobytes()
            data += bytes(int(row[j]) | int(row[j + 16]) << 4 for j in range(16))
    tensor = from_ggml_q4_0(np.frombuffer(data, np.uint8), (n, k))
    want = expected(q, d, np.full_like(q[:, : k // 32], 8), 32)
    np.testing.assert_array_equal(tensor.dequantize("float64"), want)


def test_damaged_q4_0():
    data = np.zeros(18 * 4, np.uint8)
    with pytest.raises(CheckpointError, match="blocks: expected the shape"):
        from_ggml_q4_0(data[:-1], (2, 64))
    with pytest.raises(InvalidInputError, match="multiple of 32"):
        from_ggml_q4_0(data, (2, 40))
    with pytest.raises(DTypeError, match="blocks"):
        from_ggml_q4_0(data.astype(np.int16), (2, 64))
    data[1] = 0x7C  # infinity
    with pytest.raises(CheckpointError, match="finite"):
        from_ggml_q4_0(data, (2, 64))
