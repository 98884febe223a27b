"""Quantising, dequantising and repacking a weight, beside torch's own operations."""

import pytest

from flcore.bench import select


@pytest.mark.parametrize("who", ["flcore", "torch eager"])
@pytest.mark.parametrize("case", select("weights", "cpu"), ids=lambda case: case.name)
def bench_weight_quant(case, who, track):
    track(case, who)
