"""The robust rules, and ByzFL's on torch tensors."""

import pytest

from flcore.bench import select

CASES = select("rules", "cpu")


@pytest.mark.parametrize("who", ["flcore", "byzfl"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_rule(case, who, track):
    track(case, who)
