"""Tracking runs: the cases of `flcore bench` under pytest-benchmark, one contestant at a time.

For claims ("faster than") use `flcore bench`, which lets the contestants take turns.  With
`--benchmark-disable` each body runs once on small inputs and is only checked.
"""

from __future__ import annotations

import itertools
import math
import time

import pytest

import flcore
from flcore.bench import Setup

ROUND_S = 0.5e-3  # a round shorter than this measures the clock


@pytest.fixture
def track(benchmark):
    """`track(case, who)`: time the first contestant of `case` whose name starts with `who`."""

    def run(case, who):
        if "torch" in (who, *case.needs):
            pytest.importorskip("torch")
        tiny = benchmark.disabled
        setup = Setup(threads=flcore.get_num_threads(), tiny=tiny, compiled=False)
        work = case.workload(setup)
        one = next((c for c in work.contestants if c.name.startswith(who)), None)
        if one is None:
            reasons = {why for name, why in work.absent.items() if name.startswith(who)}
            pytest.skip(f"{case.name}: no {who} contestant here ({', '.join(reasons)})")

        reset = one.reset or (lambda: None)
        matches = one.matches or work.matches
        reset()
        for slot in work.verify_slots:
            assert matches(slot, one.to_numpy(one.call(slot))) is None
        reset()

        turns = itertools.count()
        benchmark.group = f"{case.title}, {case.dtype}"
        benchmark.extra_info.update(
            bytes=work.bytes_moved,
            contestant=one.name,
            variant="cpu" if who == "flcore" else who,
            isa=flcore.build_info()["isa"],
            threads=setup.threads,
            dtype=case.dtype,
            state="hot" if case.hot else "cold",
            tiny=tiny,
        )
        benchmark.pedantic(
            lambda: one.call(next(turns) % work.slots),
            rounds=1 if tiny else 30,
            iterations=1 if tiny else calls_per_round(one.call),
            warmup_rounds=0 if tiny else 3,
        )

    return run


def calls_per_round(call):
    """Calls that make one round last `ROUND_S` or more."""
    start = time.perf_counter()
    call(0)
    return max(1, math.ceil(ROUND_S / (time.perf_counter() - start)))
