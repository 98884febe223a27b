"""The Walsh-Hadamard transform of the rotated codecs, and their sums in lanes."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.reference import hadamard as h
from flcore.reference import rng as generator


@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 32, 64])
def test_transform_is_the_hadamard_matrix(m, rng):
    matrix = np.array([[1]], np.int64)  # Sylvester's construction
    while len(matrix) < m:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x = rng.integers(-1000, 1000, (3, m))
    assert np.array_equal(h.hadamard(x), x @ matrix)
    scipy = pytest.importorskip("scipy.linalg")
    assert np.array_equal(matrix, scipy.hadamard(m))


@pytest.mark.parametrize("m", [2, 256, 512, 4096])
def test_transform_is_its_own_inverse_and_keeps_the_norm(m, rng):
    x = rng.standard_normal(m).astype(np.float32)
    z = h.hadamard(x) * h.norm(m)
    np.testing.assert_allclose(np.linalg.norm(z), np.linalg.norm(x), rtol=1e-6)
    np.testing.assert_allclose(h.hadamard(z) * h.norm(m), x, atol=2e-6)
    first = h.hadamard(np.eye(1, m, dtype=np.float32)[0]) * h.norm(m)
    assert (first == np.float32(m**-0.5)).all()
    assert abs(float(h.norm(m)) - m**-0.5) < 2**-24 * m**-0.5


def test_signs_are_bits_of_a_stream():
    words = generator.random_bits(4, 9, round=3, tensor=0x52)
    want = [bool(words[i >> 5] >> (i & 31) & 1) for i in range(128)]
    assert h.signs(0, 128, 9, 3 + 2**32).tolist() == want
    assert h.signs(32, 50, 9, 3).tolist() == want[32:82]
    x = np.array([0.0, -0.0, 1.5], np.float32)
    assert np.signbit(h.flip(x, np.array([True, True, False]))).tolist() == [True, False, False]


def test_lane_sums_have_a_fixed_order(rng):
    x = rng.standard_normal((2, 50)).astype(np.float32)
    lanes = np.zeros((2, 16), np.float32)
    for i in range(50):
        lanes[:, i % 16] += x[:, i]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    assert np.array_equal(h.lane_sum(x), lanes[:, 0])
    assert [h.padded(n) for n in (0, 1, 2, 3, 257)] == [1, 1, 2, 4, 512]
