"""Projected gradients of ten tensors, beside torch's own operations."""

import pytest

from flcore.bench import select


@pytest.mark.parametrize("who", ["flcore", "torch eager", "torch _foreach"])
@pytest.mark.parametrize("case", select("optim", "cpu"), ids=lambda case: case.name)
def bench_perp_grad(case, who, track):
    track(case, who)
