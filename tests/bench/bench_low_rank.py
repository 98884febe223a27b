"""One client's uplink: error feedback and factors of every layer."""

import pytest

from flcore.bench import select

CASES = [case for case in select("low_rank") if case.name.startswith("low_rank")]


@pytest.mark.parametrize("who", ["flcore", "numpy", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_low_rank(case, who, track):
    track(case, who)
