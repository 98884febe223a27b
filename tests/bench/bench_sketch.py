"""Count sketches: one client's uplink, and the largest coordinates of a sum."""

import pytest

from flcore.bench import select

CASES = [case for case in select("low_rank") if case.name.startswith("sketch")]


@pytest.mark.parametrize("who", ["flcore", "numpy", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_sketch(case, who, track):
    track(case, who)
