"""What was built, what this machine can run and what was chosen: the report for issues."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from flcore import _native, _variants
from flcore._version import __version__

__all__ = ["build_info", "report"]


def build_info() -> dict[str, Any]:
    """Return the facts people paste into issues; nothing optional is imported.

    Returns
    -------
    dict
        ``version``, ``python``, ``numpy``, ``platform``, ``processor``; ``isa`` (the instruction
        set in use), ``isa_built``, ``isa_usable``; ``threads``, ``openmp`` (version date),
        ``openmp_libraries`` (loaded files); ``compiler``, ``debug``, ``sanitize``; ``cuda``
        (devices and, when there is none, the reason); ``packages`` (versions, None when absent).
    """
    build = _native.core.build()
    cuda_devices, cuda_reason = _native.cuda_devices()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "isa": _native.core.isa(),
        "isa_built": build["isa_built"],
        "isa_usable": build["isa_usable"],
        "threads": _native.get_num_threads(),
        "openmp": build["openmp"],
        "openmp_libraries": _openmp_libraries(),
        "compiler": build["compiler"],
        "debug": build["debug"],
        "sanitize": build["sanitize"],
        "cuda": {
            "built": _native.cuda is not None,
            "devices": cuda_devices,
            "reason": cuda_reason,
        },
        "packages": {name: _version(name) for name in ("torch", "triton", "scikit-learn")},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _openmp_libraries() -> list[str]:
    """Files of OpenMP runtimes in this process; more than one is a performance bug."""
    if sys.platform != "linux":
        return []
    maps = Path(f"/proc/{os.getpid()}/maps").read_text().splitlines()
    files = {line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) == 6}
    return sorted(f for f in files if re.search(r"lib(g|i|)omp[0-9]*[.-]", f))


def report() -> str:
    """Return `build_info` and the variants of each op as aligned text."""
    lines = [(key, _text(key, value)) for key, value in build_info().items()]
    lines += [(f"op {op}", text) for op, text in _ops()]
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {text}" for key, text in lines)


def _text(key: str, value: Any) -> str:
    if key == "cuda":
        built = "built" if value["built"] else "not built"
        reason = f" ({value['reason']})" if value["reason"] else ""
        return f"{built}, {value['devices']} devices{reason}"
    if key == "packages":
        return ", ".join(f"{name} {version or 'not installed'}" for name, version in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return str(value)


def _ops() -> list[tuple[str, str]]:
    """Variants of each op that can run on the CPU of this machine."""
    import flcore.ops  # noqa: F401  (registers the variants)

    return [
        (op, ", ".join(name for name, why in _variants.available(op).items() if not why))
        for op in _variants.names()
    ]
