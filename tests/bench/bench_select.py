"""Rules by coordinate: one pass of sorting networks, beside ByzFL and torch."""

import pytest

from flcore.bench import select
from flcore.bench.rules import BY_COORDINATE

CASES = [case for case in select("rules", "cpu") if case.sizes["rule"] in BY_COORDINATE]


@pytest.mark.parametrize("who", ["flcore", "byzfl", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_rule(case, who, track):
    track(case, who)
