"""StableMax along a dimension and the collapse of logits, beside torch's own operations."""

import pytest

from flcore.bench import select


@pytest.mark.parametrize("who", ["flcore", "torch eager", "torch softmax"])
@pytest.mark.parametrize("case", select("stablemax", "cpu"), ids=lambda case: case.name)
def bench_stablemax(case, who, track):
    track(case, who)
