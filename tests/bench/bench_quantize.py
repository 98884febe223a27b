"""Low-bit codes: one client's uplink with error feedback, and the server's sum."""

import pytest

from flcore.bench import select


@pytest.mark.parametrize("who", ["flcore", "numpy", "torch"])
@pytest.mark.parametrize(
    "case",
    [
        *select("ef14_absmax8_10m"),
        *select("ef14_absmax4_10m"),
        *select("ef14_sign_10m"),
        *select("decode_add_32x1m_8bit"),
    ],
    ids=lambda case: case.name,
)
def bench_quantize(case, who, track):
    track(case, who)
