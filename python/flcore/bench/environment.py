"""The machine and the software of a run: names, versions, caches, and one thread count for all."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = [
    "BLAS_SPIN_S",
    "VERSIONS_OF",
    "build_to_time",
    "cpu_name",
    "last_level_cache_bytes",
    "machine",
    "optional",
    "thread_count",
    "threads_set_to",
    "versions",
]

# The threads of NumPy's OpenBLAS spin on after a call; 103 ms of a core were measured.
BLAS_SPIN_S = 0.12

VERSIONS_OF = (
    "numpy",
    "torch",
    "triton",
    "byzfl",
    "flwr",
    "ray",
    "pytest-benchmark",
    "cryptography",
)

# Assumed where the system does not tell: large enough for today's desktop and most server parts.
_DEFAULT_CACHE_BYTES = 64 * 2**20


def optional(name: str) -> tuple[ModuleType | None, str]:
    """Import `name` if possible.

    Returns
    -------
    (module, "") or (None, reason), with the reason fit for a table: "not installed", or what went
    wrong in the import of an installed module.
    """
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name == name.split(".")[0]:
            return None, "not installed"
        return None, f"does not import: {error}"
    except Exception as error:
        # some packages raise anything on import, such as a torchvision built for another torch
        return None, f"does not import: {type(error).__name__}: {error}"


def versions() -> dict[str, str | None]:
    """Version of every package that can take part; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def build_to_time(tiny: bool) -> dict[str, Any]:
    """Return `flcore.build_info()`.

    Raises
    ------
    RuntimeError
        With a debug build, unless `tiny`: its times would say nothing.
    """
    import flcore

    build_info = flcore.build_info()
    if build_info["debug"] and not tiny:
        raise RuntimeError(
            "this is a debug or sanitizer build, whose times say nothing: "
            "reinstall without FLCORE_DEBUG, or pass --tiny to check that the cases run"
        )
    return build_info


def cpu_name() -> str:
    """Model name of the processor, as the system reports it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def last_level_cache_bytes() -> int:
    """Bytes of the largest cache one core can reach."""
    sizes = [_DEFAULT_CACHE_BYTES]
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text().strip()
            factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
            found.append(int(text.rstrip("KMG")) * factor)
    return max(found or sizes)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Facts about the hardware and the system that belong beside every number."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "cache_bytes": last_level_cache_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    if device == "cuda":
        from flcore.bench.cuda import device_facts

        facts |= device_facts()
    return facts


def thread_count(requested: int | None = None) -> int:
    """Threads of every contestant: `requested`, or what flcore uses by default."""
    if requested is not None:
        if requested < 1:
            raise ValueError(f"threads: expected at least 1, got {requested}")
        return requested
    import flcore

    return int(flcore.get_num_threads())


@contextlib.contextmanager
def threads_set_to(count: int) -> Iterator[dict[str, int | str]]:
    """Give flcore, torch and NumPy's BLAS the same number of threads; restore them afterwards.

    Yields the number each of them got; a string says why it could not be set.
    """
    import flcore

    before = flcore.get_num_threads()

    def restore() -> None:
        flcore.set_num_threads(None)
        if flcore.get_num_threads() != before:
            flcore.set_num_threads(before)

    with contextlib.ExitStack() as stack:
        stack.callback(restore)
        flcore.set_num_threads(count)
        given: dict[str, int | str] = {"flcore": count}
        torch, _ = optional("torch")
        if torch is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(count)
            given["torch"] = count
        threadpoolctl, reason = optional("threadpoolctl")
        if threadpoolctl is not None:
            stack.enter_context(threadpoolctl.threadpool_limits(count, user_api="blas"))
            given["blas"] = count
        else:
            given["blas"] = f"not set (threadpoolctl {reason})"
        yield given
