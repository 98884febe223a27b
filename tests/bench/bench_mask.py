"""Secure sums: adding masked messages, making keystreams, encoding an update with its masks."""

import pytest

from flcore.bench import select


@pytest.mark.parametrize("who", ["flcore", "numpy", "torch", "cryptography"])
@pytest.mark.parametrize("case", select("secure", "cpu"), ids=lambda case: case.name)
def bench_secure(case, who, track):
    track(case, who)
