"""One client's uplink: error control, exact top-k and the packet."""

import pytest

from flcore.bench import select


@pytest.mark.parametrize("who", ["flcore", "numpy", "torch"])
@pytest.mark.parametrize("case", select("econtrol_top1_10m"), ids=lambda case: case.name)
def bench_econtrol_encode(case, who, track):
    track(case, who)
