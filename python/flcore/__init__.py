"""flcore: the compute core of federated learning.

Submodules are imported on first use, so that `import flcore` costs NumPy and the compiled core
only: aggregation, algorithms, bench, compression, integrations, losses, nn, ops, optim, privacy,
quantization, reference, simulation. The parts that need torch say so when they are imported
without it.
"""

from __future__ import annotations

import importlib
from typing import Any

from flcore import errors
from flcore._info import build_info
from flcore._native import get_num_threads, set_num_threads
from flcore._output_pool import clear_cache
from flcore._version import __version__

__all__ = [
    "__version__",
    "aggregation",
    "algorithms",
    "bench",
    "build_info",
    "clear_cache",
    "compression",
    "errors",
    "get_num_threads",
    "integrations",
    "losses",
    "nn",
    "ops",
    "optim",
    "privacy",
    "quantization",
    "reference",
    "set_num_threads",
    "simulation",
]

_LAZY = frozenset(__all__) - {"__version__", "build_info", "clear_cache", "errors"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"flcore.{name}")
    raise AttributeError(f"module 'flcore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
