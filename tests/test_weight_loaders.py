"""Loaders of layouts in words, AutoAWQ and GPTQ: laid out here by plain loops, to come back."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.errors import CheckpointError, DTypeError, InvalidInputError
from flcore.quantization import from_autoawq, from_gptq, gptq_order, gptq_zero_offset
from support import HAS_TORCH
from weight_layouts import ONE_TO_EIGHT, codes_of, draw, expected


def word(nibbles) -> int:
    return sum(int(x) << (4 * i) for i, x in enumerate(nibbles))


def as_int32(words) -> np.ndarray:
    return np.array(words, np.uint32).view(np.int32)


# ---- AutoAWQ -------------------------------------------------------------------------------------


def awq_words(matrix: np.ndarray) -> np.ndarray:
    """(rows, columns / 8) words: nibble i of word c is column 8 c + o[i]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    rows = []
    for row in matrix:
        rows.append([word([row[8 * c + o] for o in order]) for c in range(len(row) // 8)])
    return as_int32(rows)


def test_codes_1_to_8_in_an_awq_word():
    assert awq_words(ONE_TO_EIGHT[None])[0, 0] == np.uint32(0x86427531).view(np.int32)
    qweight = np.repeat(as_int32([[0x86427531]]), 16, axis=0)  # k = 16 equal rows
    scales, qzeros = np.ones((1, 8), np.float16), as_int32([[0]])
    assert (codes_of(from_autoawq(qweight, qzeros, scales)) == ONE_TO_EIGHT[:, None]).all()


@pytest.mark.parametrize(("n", "k", "group"), [(8, 32, 16), (24, 160, 32), (40, 96, 96)])
def test_autoawq(n, k, group, rng):
    q, s, z = draw(rng, n, k, group, 4)
    tensor = from_autoawq(awq_words(q.T), awq_words(z.T), np.ascontiguousarray(s.T))
    assert tensor.shape == (n, k) and tensor.scheme.kind == "integer_zero"
    np.testing.assert_array_equal(codes_of(tensor), q)
    np.testing.assert_array_equal(tensor.dequantize("float64"), expected(q, s, z, group))


def test_autoawq_with_a_short_last_group(rng):
    q, s, z = draw(rng, 8, 80, 32, 4)
    parts = awq_words(q.T), awq_words(z.T), np.ascontiguousarray(s.T)
    with pytest.raises(CheckpointError, match="3 groups do not divide the 80 inputs"):
        from_autoawq(*parts)
    tensor = from_autoawq(*parts, group_size=32)
    np.testing.assert_array_equal(tensor.dequantize("float64"), expected(q, s, z, 32))


def test_damaged_awq(rng):
    q, s, z = draw(rng, 16, 64, 32, 4)
    weight, zeros, scales = awq_words(q.T), awq_words(z.T), np.ascontiguousarray(s.T)
    with pytest.raises(CheckpointError, match="scales: expected 16 columns"):
        from_autoawq(weight, zeros, scales[:, :15])
    with pytest.raises(CheckpointError, match="qzeros: expected the shape"):
        from_autoawq(weight, zeros[:1], scales)
    with pytest.raises(CheckpointError, match="expected 4 groups of 16"):
        from_autoawq(weight, zeros, scales, group_size=16)
    with pytest.raises(DTypeError, match="qweight: expected int32 or uint32, got int64"):
        from_autoawq(weight.astype(np.int64), zeros, scales)
    with pytest.raises(DTypeError, match="scales: expected float16"):
        from_autoawq(weight, zeros, scales.astype(np.float64))
    with pytest.raises(DTypeError, match="qzeros: expected a NumPy array"):
        from_autoawq(weight, zeros.tolist(), scales)
    with pytest.raises(CheckpointError, match="qweight: expected 2 dimensions"):
        from_autoawq(weight.reshape(-1), zeros, scales)
    scales[1, 3] = np.inf
    with pytest.raises(CheckpointError, match="scales: expected finite"):
        from_autoawq(weight, zeros, scales)


# ---- GPTQ ----------------------------------------------------------------------------------------


def stream_words(values, bits: int) -> list[int]:
    """Words that hold the values one after another, the lowest bits first."""
    number = sum(int(v) << (bits * i) for i, v in enumerate(values))
    return [(number >> (32 * i)) & 0xFFFFFFFF for i in range(len(values) * bits // 32)]


def gptq_parts(q, s, z, bits: int, offset: int):
    qweight = as_int32([stream_words(row, bits) for row in q]).T.copy()
    stored = z.astype(int) - offset
    qzeros = as_int32([stream_words(column, bits) for column in stored.T])
    return qweight, qzeros, np.ascontiguousarray(s.T)


def test_codes_1_to_8_in_a_gptq_word():
    assert stream_words(ONE_TO_EIGHT, 4) == [0x87654321]
    qweight = np.tile(as_int32([[0x87654321]]), (2, 8))
    tensor = from_gptq(qweight, as_int32([[0]]), np.ones((1, 8), np.float16), zero_offset=0)
    assert (codes_of(tensor) == np.tile(ONE_TO_EIGHT, 2)).all()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits, offset, rng):
    n, k, group = 32, 96, 32
    q, s, z = draw(rng, n, k, group, bits)
    z = np.maximum(z, offset)
    tensor = from_gptq(*gptq_parts(q, s, z, bits, offset), bits=bits, zero_offset=offset)
    np.testing.assert_array_equal(codes_of(tensor), q)
    np.testing.assert_array_equal(tensor.zeros, z)
    np.testing.assert_array_equal(tensor.dequantize("float64"), expected(q, s, z, group))


def test_three_bit_codes_across_words_as_the_writer_packs_them():
    """32 codes in three words: 10, one split 2 + 1, 10, one split 1 + 2, 10."""
    q = (np.arange(32) * 5 % 8).astype(int)
    a = sum(q[i] << (3 * i) for i in range(10)) | (q[10] & 3) << 30
    b = q[10] >> 2 | sum(q[11 + i] << (3 * i + 1) for i in range(10)) | (q[21] & 1) << 31
    c = q[21] >> 1 | sum(q[22 + i] << (3 * i + 2) for i in range(10))
    qweight = np.repeat(as_int32([[a], [b], [c]]), 32, axis=1)
    tensor = from_gptq(
        qweight, as_int32([[0, 0, 0]]), np.ones((1, 32), np.float16), bits=3, zero_offset=0
    )
    assert (codes_of(tensor) == q).all()


def test_the_zero_offset_is_asked_for_and_read_from_the_config_only(rng):
    q, s, z = draw(rng, 8, 32, 16, 4)
    z = np.maximum(z, 1)
    parts = gptq_parts(q, s, z, 4, 1)
    with pytest.raises(InvalidInputError, match="zero_offset: expected 1"):
        from_gptq(*parts)
    by_config = from_gptq(*parts, config={"bits": 4, "checkpoint_format": "gptq"})
    np.testing.assert_array_equal(by_config.zeros, z)
    assert gptq_zero_offset({"checkpoint_format": "gptq_v2"}) == 0
    with pytest.raises(CheckpointError, match="checkpoint_format"):
        gptq_zero_offset({"bits": 4})
    with pytest.raises(InvalidInputError, match="the config says 1"):
        from_gptq(*parts, zero_offset=0, config={"checkpoint_format": "gptq"})
    with pytest.raises(InvalidInputError, match="zero_offset: expected 0 or 1"):
        from_gptq(*parts, zero_offset=2)


def test_a_zero_that_the_offset_lifts_beyond_the_codes_is_an_error(rng):
    q, s, z = draw(rng, 8, 32, 16, 4)
    z[3, 1] = 15
    with pytest.raises(CheckpointError, match="qzeros: a stored zero of 15 stands for 16"):
        from_gptq(*gptq_parts(q, s, z, 4, 0), zero_offset=1)


def test_gptq_with_scattered_groups(rng):
    n, k, group = 8, 64, 16
    q, s, z = draw(rng, n, k, group, 4)
    g_idx = rng.permutation(np.arange(k) // group).astype(np.int32)
    w = np.empty((n, k))
    for i in range(n):
        for j in range(k):
            w[i, j] = (float(q[i, j]) - float(z[i, g_idx[j]])) * float(s[i, g_idx[j]])
    parts = gptq_parts(q, s, z, 4, 0)
    with pytest.raises(InvalidInputError, match="g_idx: inputs are not in the order"):
        from_gptq(*parts, zero_offset=0, g_idx=g_idx)
    order = gptq_order(g_idx)
    tensor = from_gptq(*parts, zero_offset=0, g_idx=g_idx, order=order)
    np.testing.assert_array_equal(tensor.dequantize("float64"), w[:, order])
    same = from_gptq(*parts, zero_offset=0, g_idx=np.arange(k) // group)
    assert same.shape == (n, k)


def test_damaged_gptq(rng):
    q, s, z = draw(rng, 8, 64, 16, 4)
    weight, zeros, scales = gptq_parts(q, s, z, 4, 0)
    with pytest.raises(CheckpointError, match="qzeros: expected the shape"):
        from_gptq(weight, zeros[:, :0], scales, zero_offset=0)
    with pytest.raises(CheckpointError, match="scales: expected the shape"):
        from_gptq(weight, zeros, scales[:, :7], zero_offset=0)
    with pytest.raises(CheckpointError, match="do not hold whole columns"):
        from_gptq(weight[:7], zeros, scales, bits=3, zero_offset=0)
    with pytest.raises(CheckpointError, match="g_idx: expected 16 inputs in each group"):
        from_gptq(weight, zeros, scales, zero_offset=0, g_idx=np.zeros(64, np.int32))
    with pytest.raises(InvalidInputError, match="bits"):
        from_gptq(weight, zeros, scales, bits=5, zero_offset=0)
    with pytest.raises(InvalidInputError, match="order: expected every input"):
        from_gptq(weight, zeros, scales, zero_offset=0, order=np.zeros(64, np.int64))


# ---- torch ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch_parts_make_torch_weights(rng):
    import torch

    q, s, z = draw(rng, 16, 64, 32, 4)
    arrays = awq_words(q.T), awq_words(z.T), np.ascontiguousarray(s.T)
    tensor = from_autoawq(*(torch.from_numpy(x) for x in arrays))
    assert isinstance(tensor.codes, torch.Tensor)
    np.testing.assert_array_equal(tensor.dequantize(torch.float64).numpy(), expected(q, s, z, 32))
    half = torch.from_numpy(arrays[2]).bfloat16()
    tensor = from_autoawq(torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1]), half)
    want = expected(q, half.T.double().numpy(), z, 32)
    np.testing.assert_array_equal(tensor.dequantize(torch.float64).numpy(), want)
