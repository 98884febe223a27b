"""Read and copy bandwidth of this machine, measured beside the cases and not once for all.

The probes are contestants like any other: they take their turns in the rounds of a case, so that
"percent of the copy bandwidth" compares with what the machine could do at that moment and with
the same number of threads.

* read: a vectorised sum over a 256 MB buffer, counts 256 MB.
* copy: one 256 MB buffer to another, counts 512 MB (what is read plus what is written).

Both buffers are far larger than any cache and touched before they are timed.  GB/s are 1e9 bytes
per second.

`arithmetic` adds what the vector units do with values in registers and first-level cache, for
kernels that compute a lot with each byte:

* exchanges: minimum and maximum of two values, the step of a sorting network,
* products: `s += a * b`, the step of a weighted sum,
* differences: `s += (a - b)**2`, the step of a squared distance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flcore.bench.intervals import Interval, PairedTimes
from flcore.bench.timers import Contestant

__all__ = [
    "COPY",
    "DIFFERENCES",
    "EXCHANGES",
    "PROBE_BYTES",
    "PRODUCTS",
    "READ",
    "Roofline",
    "arithmetic",
    "percent_of",
    "probes",
]

PROBE_BYTES = 256_000_000
READ, COPY = "read bandwidth", "copy bandwidth"
EXCHANGES, PRODUCTS, DIFFERENCES = "exchanges", "products", "differences"

# Of the arithmetic probes: about a millisecond a call.
PROBE_ROUNDS = 200_000


@dataclass(frozen=True)
class Roofline:
    """Probes of a run.

    Attributes
    ----------
    contestants : tuple of Contestant
        To be appended to the contestants of every case.
    amount_of : dict
        Bytes, or operations, that one call of each probe counts, by name.
    """

    contestants: tuple[Contestant, ...]
    amount_of: dict[str, int]

    def gigabytes_per_second(self, times: PairedTimes, name: str) -> float:
        """Median bandwidth of the probe `name` in the rounds of one case."""
        return self.amount_of[name] / times.quantiles(name)[1] / 1e9


def percent_of(roofline: Roofline, probe: str, times: PairedTimes, moved: int) -> Interval:
    """Bandwidth of the yardstick as a percentage of `probe`, paired within rounds.

    Parameters
    ----------
    moved : int
        Bytes that the yardstick (the first contestant of `times`) must move in one call.
    """
    return times.ratio(probe).scaled(100.0 * moved / roofline.amount_of[probe])


def probes(device: str, threads: int, nbytes: int = PROBE_BYTES) -> Roofline:
    """Allocate and touch the buffers; return the probes for `device`.

    Parameters
    ----------
    device : str
        "cpu" or "cuda".
    threads : int
        Threads of the host probes.
    nbytes : int
        Size of each buffer, rounded down to a multiple of 64.
    """
    nbytes -= nbytes % 64
    if device == "cuda":
        from flcore.bench.cuda import probe_calls

        read, copy = probe_calls(nbytes)
    else:
        read, copy = _host_calls(nbytes, threads)
    return Roofline(
        contestants=(
            Contestant(READ, read, to_numpy=_no_result, matches=_unchecked, kind="probe"),
            Contestant(COPY, copy, to_numpy=_no_result, matches=_unchecked, kind="probe"),
        ),
        amount_of={READ: nbytes, COPY: 2 * nbytes},
    )


def arithmetic(threads: int, rounds: int = PROBE_ROUNDS) -> Roofline:
    """Return the arithmetic probes of the host, float32 at the instruction-set level in use."""
    from flcore._native import core

    calls = {
        EXCHANGES: core.probe_exchanges,
        PRODUCTS: core.probe_products,
        DIFFERENCES: core.probe_differences,
    }

    def contestant(name: str) -> Contestant:
        return Contestant(
            name,
            lambda slot: calls[name](rounds, threads),
            to_numpy=_no_result,
            matches=_unchecked,
            kind="probe",
        )

    return Roofline(
        contestants=tuple(contestant(name) for name in calls),
        amount_of={name: call(rounds, threads) for name, call in calls.items()},
    )


def _no_result(result: Any) -> np.ndarray:
    return np.empty(0)


def _unchecked(slot: int, result: np.ndarray) -> str | None:
    return None


def _host_calls(nbytes: int, threads: int) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    src = np.ones(nbytes // 4, np.float32)
    dst = np.zeros(nbytes // 4, np.float32)
    dst += 1  # pages of zeros are not really there until they are written
    from flcore._native import core

    # the lambdas hold src and dst: the addresses stay valid as long as the probes exist
    return (
        lambda slot: core.probe_read(src.ctypes.data, nbytes, threads),
        lambda slot: core.probe_copy(dst.ctypes.data, src.ctypes.data, nbytes, threads),
    )
