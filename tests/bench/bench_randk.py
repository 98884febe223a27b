"""Error feedback with random coordinates."""

import pytest

from flcore.bench import select


@pytest.mark.parametrize("who", ["flcore", "numpy", "torch"])
@pytest.mark.parametrize("case", select("randk_ef14_10m_1pct"), ids=lambda case: case.name)
def bench_randk(case, who, track):
    track(case, who)
