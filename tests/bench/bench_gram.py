"""Rules on distances: one pass of differences and one of sums, beside ByzFL."""

import pytest

from flcore.bench import select
from flcore.bench.rules import BY_COORDINATE

CASES = [case for case in select("rules", "cpu") if case.sizes["rule"] not in BY_COORDINATE]


@pytest.mark.parametrize("who", ["flcore", "byzfl"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_rule(case, who, track):
    track(case, who)
