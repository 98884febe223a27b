"""Gradients through packed weights, beside writing the whole matrix back and multiplying by it."""

import pytest

from flcore.bench.qmatmul_dx import CASES


@pytest.mark.parametrize("who", ["flcore qmatmul_dx", "flcore dequantize", "torch dequantize"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_qmatmul_dx(case, who, track):
    track(case, who)
