"""Mean and variance of a vector, of the layers of a model, and of what is being accumulated."""

import pytest

from flcore.bench import select


@pytest.mark.parametrize("who", ["flcore", "numpy", "torch"])
@pytest.mark.parametrize("case", select("moments", "cpu"), ids=lambda case: case.name)
def bench_moments(case, who, track):
    track(case, who)
