"""Coordinates of sparse packets as bytes, and back."""

import pytest

from flcore.bench import select

CASES = [*select("indices_write_10m_1pct"), *select("indices_read_10m_1pct")]


@pytest.mark.parametrize("who", ["flcore", "numpy"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_indices(case, who, track):
    track(case, who)
