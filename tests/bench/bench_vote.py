"""Majority vote of packed signs."""

import pytest

from flcore.bench import select


@pytest.mark.parametrize("who", ["flcore", "numpy", "torch"])
@pytest.mark.parametrize("case", select("vote_31x1m"), ids=lambda case: case.name)
def bench_vote(case, who, track):
    track(case, who)
