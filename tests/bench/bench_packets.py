"""Robust rules and server steps straight from packets."""

import pytest

from flcore.bench import select


@pytest.mark.parametrize("who", ["flcore", "torch"])
@pytest.mark.parametrize(
    "case", [c for c in select("packets") if c.name != "vote_31x1m"], ids=lambda case: case.name
)
def bench_packets(case, who, track):
    track(case, who)
