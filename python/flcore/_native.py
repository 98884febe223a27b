"""Loads the compiled modules and settles the process-wide choices: one OpenMP runtime, threads."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from flcore import errors

__all__ = [
    "core",
    "cuda",
    "cuda_devices",
    "cuda_reason",
    "get_num_threads",
    "num_threads",
    "set_num_threads",
    "threads_for",
]

# Below this many values (about 20 us of one core) waking a team of threads does not pay, and on a
# busy machine it can wait milliseconds for the other core.
SERIAL_WORK = 1 << 17


def _share_torch_openmp() -> None:
    """Open torch's libgomp first, without importing torch, so that our core binds to it.

    Two copies of the runtime in one process spin against each other: thousands of times slower.
    """
    spec = importlib.util.find_spec("torch")
    for base in (spec.submodule_search_locations or []) if spec else []:
        in_torch = Path(base, "lib").glob("libgomp*.so*")
        beside_torch = Path(base).parent.glob("torch.libs/libgomp*.so*")
        for library in sorted([*in_torch, *beside_torch]):
            try:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return


def _load(name: str) -> tuple[ModuleType | None, str]:
    """(module, "") or (None, the reason why it is missing)."""
    if importlib.util.find_spec(f"flcore.{name}") is None:
        return None, f"this build has no {name} module"
    try:
        return importlib.import_module(f"flcore.{name}"), ""
    except ImportError as err:
        return None, f"{name} is installed but does not load: {err}"


def _load_core() -> ModuleType:
    module, why = _load("_core")
    if module is None:
        hint = " (install libgomp1, or torch, which brings one)" if "libgomp" in why else ""
        raise ImportError(f"flcore cannot work without its compiled core: {why}{hint}")
    module.translate_errors(errors.InvalidInputError, errors.PacketError)
    module.isa()  # an FLCORE_ISA that cannot run here fails at import, not in the first call
    return module


_share_torch_openmp()
core: ModuleType = _load_core()
cuda: Any
cuda, cuda_reason = _load("_cuda")


@functools.cache
def cuda_devices() -> tuple[int, str]:
    """Return the number of CUDA devices and, when there is none, why.

    Asks the driver at the first call, not at import: that takes a while, and a process that has
    spoken to the driver cannot fork children that use it.
    """
    return (0, cuda_reason) if cuda is None else cuda.device_count()


_threads: int | None = None  # None: follow torch, else OpenMP and the cores of this process


def set_num_threads(n: int | None) -> None:
    """Set the number of CPU threads of flcore's kernels; None follows torch or the machine again.

    Raises
    ------
    InvalidInputError
        `n` is not a positive integer.
    """
    global _threads
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise errors.InvalidInputError(f"n: expected a positive number of threads, got {n!r}")
    _threads = n


def get_num_threads() -> int:
    """Return the number of CPU threads a large call uses.

    What `set_num_threads` said; else torch's setting if torch is imported; else OpenMP's maximum,
    capped by the cores this process may use (affinity and container quota). In a forked child: 1,
    because GNU OpenMP cannot start a team there, until `set_num_threads` is called again.
    """
    if _threads is not None:
        return _threads
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    return max(1, min(core.max_threads(), _usable_cores()))


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Set the number of threads within a `with` block."""
    before = _threads
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(before)


def threads_for(work: int) -> int:
    """Threads for a call that touches `work` values."""
    return 1 if work < SERIAL_WORK else get_num_threads()


def _usable_cores() -> int:
    global _cores
    if _cores is None:
        affinity = getattr(os, "sched_getaffinity", None)
        _cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        try:  # cgroup v2 quota of a container: "max 100000" or "150000 100000"
            quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
            if quota != "max":
                _cores = max(1, min(_cores, -(-int(quota) // int(period))))
        except (OSError, ValueError):
            pass
    return _cores


_cores: int | None = None


def _after_fork() -> None:
    set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
