"""Bags over quantised tables and the gradient of their rows, beside torch and NumPy."""

import pytest

from flcore.bench.qembedding import CASES


@pytest.mark.parametrize("who", ["flcore", "torch", "numpy"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_qembedding(case, who, track):
    track(case, who)
