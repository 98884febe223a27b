"""Local training of the clients of a round: together, one after another, and in torch's way."""

import pytest

from flcore.bench import select


@pytest.mark.parametrize("who", ["flcore", "torch"])
@pytest.mark.parametrize("case", select("simulation", "cpu"), ids=lambda case: case.name)
def bench_simulation(case, who, track):
    track(case, who)
