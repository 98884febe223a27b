"""Products with weights of 2 to 8 bits beside torch and bitsandbytes."""

import pytest

from flcore.bench import select

CASES = [
    case for case in select("qmatmul", "cpu") if case.build.__module__ == "flcore.bench.qmatmul"
]
PEERS = ("flcore qmatmul", "torch F.linear", "torch _weight_int4pack", "bitsandbytes")


@pytest.mark.parametrize("who", PEERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_qmatmul(case, who, track):
    track(case, who)
