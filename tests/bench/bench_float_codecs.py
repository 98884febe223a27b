"""Floating-point codes: an update into a packet and back."""

import pytest

from flcore.bench import select

NAMES = ("mx", "fp8", "natural", "bfloat16")
CASES = [case for name in NAMES for case in select(f"{name}_round_trip_10m")]


@pytest.mark.parametrize("who", ["flcore", "uncompressed", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_round_trip(case, who, track):
    track(case, who)
