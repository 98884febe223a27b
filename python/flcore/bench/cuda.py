"""The CUDA side of the benchmarks: timer, probes and device facts.  Imported with a GPU only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["CudaTimer", "cache_bytes", "device_facts", "probe_calls"]


class CudaTimer:
    """Time of one call on the current stream, by a pair of events.

    Before each call a buffer of four times the L2 cache is *read*: this evicts the inputs and
    leaves no dirty lines whose write-back would be charged to the call.  The read also keeps the
    device busy for some 100 us while the host queues the call, so that launches are hidden as they
    are in a running job.  A call that waits for the device, for instance to look at a flag, pays
    for the wait.

    Parameters
    ----------
    hot : bool
        Leave the cache as it is.
    """

    def __init__(self, hot: bool = False) -> None:
        numel = max(4 * cache_bytes(), 256 * 2**20) // 4
        self._flush = None if hot else torch.ones(numel, device="cuda")
        self._sum = torch.empty((), device="cuda")
        self._start = torch.cuda.Event(enable_timing=True)
        self._stop = torch.cuda.Event(enable_timing=True)

    def measure(self, call: Callable[[int], Any], slot: int) -> float:
        """Return the device seconds between the start and the end of `call(slot)`."""
        if self._flush is not None:
            torch.sum(self._flush, dim=0, out=self._sum)
        self._start.record()
        result = call(slot)
        self._stop.record()
        self._stop.synchronize()
        del result
        return self._start.elapsed_time(self._stop) * 1e-3


def cache_bytes() -> int:
    """Bytes of the L2 cache; 64 MiB where torch does not tell."""
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * 2**20)


def device_facts() -> dict[str, Any]:
    """Name and size of the GPU, versions of the driver side."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "gpu_cache_bytes": cache_bytes(),
        "gpu_multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def probe_calls(nbytes: int) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """Device-to-device copy and a sum as read probe, over buffers of `nbytes`."""
    src = torch.ones(nbytes // 4, device="cuda")
    dst = torch.zeros_like(src)
    total = torch.empty((), device="cuda")
    return (
        lambda slot: torch.sum(src, dim=0, out=total),
        lambda slot: dst.copy_(src),
    )
