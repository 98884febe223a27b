"""The weighted mean and a step of a server optimiser along it."""

import pytest

from flcore.bench import select


@pytest.mark.parametrize("who", ["flcore", "numpy", "torch"])
@pytest.mark.parametrize("case", select("server", "cpu"), ids=lambda case: case.name)
def bench_server_step(case, who, track):
    track(case, who)
