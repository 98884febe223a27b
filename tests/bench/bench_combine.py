"""The weighted mean of resident updates and of updates that arrive one by one."""

import pytest

from flcore.bench import select

CASES = select("aggregation", "cpu")


@pytest.mark.parametrize("who", ["flcore", "numpy", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_weighted_mean(case, who, track):
    track(case, who)
