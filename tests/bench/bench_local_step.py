"""Local steps, ends of rounds and the linear server step, beside torch's own operations."""

import pytest

from flcore.bench import select


@pytest.mark.parametrize("who", ["flcore", "torch"])
@pytest.mark.parametrize("case", select("local_step", "cpu"), ids=lambda case: case.name)
def bench_local_step(case, who, track):
    track(case, who)
