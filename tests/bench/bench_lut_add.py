"""Rotated codes and integer sums of codes, beside NumPy and torch chains."""

import pytest

from flcore.bench.rotated import CASES


@pytest.mark.parametrize("who", ["flcore", "numpy", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_rotated(case, who, track):
    track(case, who)
