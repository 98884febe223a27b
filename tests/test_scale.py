"""Memory of a long stream: many clients, one model.

``python tests/test_scale.py mean 1000 10000000`` prints the peak in models for one of the cases.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flcore.aggregation import Accumulator, Clipping

CASES = ("mean", "clipped", "centre")


def peak() -> float:
    """Most bytes of memory this process has held so far.

    From the kernel's account of this program where there is one: ru_maxrss of a new program begins
    with the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return float(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def arrivals(buffer: np.ndarray, clients: int) -> Iterator[tuple[np.ndarray, float]]:
    """Updates of norm 1, all in one buffer: client i has blocks of 1 / sqrt(numel) and the sign of
    i mod 3 - 1; weights 1, 2, 3, 4, 1, ... .
    """
    value = 1 / np.sqrt(len(buffer))
    for i in range(clients):
        buffer.fill(value * (i % 3 - 1))
        yield buffer, float(i % 4 + 1)


def run(case: str, clients: int, numel: int) -> float:
    """Stream and return the peak in models, beyond what was there before the first array."""
    Accumulator(np.ones(2, np.float32), before=Clipping(1.0)).add(np.ones(2, np.float32)).result()
    before = peak()
    start = time.perf_counter()
    buffer = np.zeros(numel, np.float32)
    options = {} if case == "mean" else {"before": Clipping(0.5)}
    if case == "centre":
        options["center"] = np.full(numel, 1.0, np.float32)
    total = Accumulator(buffer, **options)
    q, sums = 0.0, 0.0
    for update, weight in arrivals(buffer, clients):
        total.add(update, weight)
        x = float(update[0]) * np.sqrt(numel)  # along the direction of all updates
        v = np.sqrt(numel) if case == "centre" else 0.0
        far = abs(x - v)
        factor = 1.0 if case == "mean" or far <= 0.5 else 0.5 / far
        q, sums = q + weight, sums + weight * (v + factor * (x - v))
    mean = total.result(out=buffer)
    models = (peak() - before) / (4 * numel)
    seconds = time.perf_counter() - start
    want = sums / q / np.sqrt(numel)
    assert np.abs(mean - want).max() <= 1e-5 * max(abs(want), 1 / np.sqrt(numel)), (mean, want)
    print(f"{models:.3f} models, {seconds:.1f} s, {1e3 * seconds / clients:.1f} ms a client")
    return models


def measured(case: str, clients: int, numel: int) -> float:
    command = [sys.executable, __file__, case, str(clients), str(numel)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[0])


@pytest.mark.parametrize("case", CASES)
def test_a_stream_needs_two_models_of_memory(case):
    """The buffer of the update and the accumulator; the centre is a third."""
    models = measured(case, 20, 4_000_000)
    held = 3 if case == "centre" else 2
    assert held - 0.1 < models < held + 0.5


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("FLCORE_FULL_SIZE") != "1", reason="FLCORE_FULL_SIZE=1 runs it, half a minute"
)
def test_a_thousand_clients_of_ten_million_values():
    assert measured("mean", 1_000, 10_000_000) < 3
    assert measured("clipped", 1_000, 10_000_000) < 3


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
