"""Products of quantised activations and weights beside ONNX Runtime and torch's int8 product."""

import pytest

from flcore.bench.qmatmul_int8 import CASES

FOUR = [case for case in CASES if case.name.startswith("w4a8")]
EIGHT = [case for case in CASES if case.name.startswith("w8a8")]


@pytest.mark.parametrize("who", ["flcore W4A8", "ONNX Runtime MatMulNBits"])
@pytest.mark.parametrize("case", FOUR, ids=lambda case: case.name)
def bench_four_bits(case, who, track):
    track(case, who)


@pytest.mark.parametrize("who", ["flcore W8A8", "torch quantise, _int_mm, scale"])
@pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)
def bench_eight_bits(case, who, track):
    track(case, who)
