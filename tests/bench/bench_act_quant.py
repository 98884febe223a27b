"""Activations to 8 bits by row, beside the torch operations that do it."""

import numpy as np
import pytest

from flcore.ops import quantize_activation

ROWS = {"256 rows": 256, "one row": 1}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def bench_flcore(rows, benchmark):
    x = np.random.default_rng(0).standard_normal((rows, 4096)).astype(np.float32)
    benchmark(quantize_activation, x)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def bench_torch(rows, benchmark):
    torch = pytest.importorskip("torch")
    x = torch.randn(rows, 4096)

    def quantise():
        scale = x.abs().amax(1, keepdim=True) / 127
        return torch.round(x / scale).to(torch.int8), scale

    benchmark(quantise)
