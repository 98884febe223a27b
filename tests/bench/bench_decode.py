"""The server's side of compressed updates: adding packets into one dense vector."""

import pytest

from flcore.bench import select


@pytest.mark.parametrize("who", ["flcore", "numpy", "torch"])
@pytest.mark.parametrize("case", select("decode_add_32x1m_top1"), ids=lambda case: case.name)
def bench_decode_add(case, who, track):
    track(case, who)
