"""One client's uplink: error control, exact top-k and the packet."""

import pytest

from flcore.bench import select

CASES = [
    case
    for name in ("econtrol_top1_10m", "econtrol_first_top1_10m", "top1_10m")
    for case in select(name)
]


@pytest.mark.parametrize("who", ["flcore", "numpy", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_encode(case, who, track):
    track(case, who)
