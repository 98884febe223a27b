"""The variant table: which implementation of an op runs for which device, and why not another.

A variant is a function with the same signature as its siblings. On a CPU the order is `cpu`,
`reference`; on a GPU `cuda`, `triton`, `reference`. `FLCORE_BACKEND` forces one for the process.
Nothing falls back in silence once a variant was named.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flcore.errors import InvalidInputError, VariantUnavailableError

__all__ = ["NAMES", "add", "available", "choose", "lazy", "names"]

NAMES = ("reference", "cpu", "cuda", "triton")
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

log = logging.getLogger("flcore")


def _nothing_missing(device: str) -> str:
    return ""


@dataclass(frozen=True)
class Variant:
    """One implementation: `load()` returns the function, `missing(device)` says why it cannot."""

    load: Callable[[], Callable[..., Any]]
    missing: Callable[[str], str] = _nothing_missing


_table: dict[str, dict[str, Variant]] = {}


def add(
    op: str,
    name: str,
    load: Callable[[], Callable[..., Any]],
    missing: Callable[[str], str] = _nothing_missing,
) -> None:
    """Register variant `name` of `op`.

    Parameters
    ----------
    op : str
        Name of the op.
    name : str
        One of `NAMES`.
    load : callable
        Returns the function; imports of optional modules belong in here.
    missing : callable
        Called with the device ("cpu", "cuda:0"); returns "" when the variant can run there, else
        the reason as a sentence for the user.
    """
    if name not in NAMES:
        raise ValueError(f"variant name {name!r}: expected one of {NAMES}")
    _table.setdefault(op, {})[name] = Variant(load, missing)


def names() -> list[str]:
    """Return the ops that have been registered, sorted."""
    return sorted(_table)


def lazy(module: str, name: str) -> Callable[[], Callable[..., Any]]:
    """Return a loader for `add` that imports `module` when the variant is first chosen."""
    return lambda: getattr(importlib.import_module(module), name)


def available(op: str, device: str = "cpu") -> dict[str, str]:
    """Variants of `op` and, for each, "" when it can run on `device` or the reason why not."""
    return {name: v.missing(device) for name, v in _table[op].items()}


def choose(op: str, device: str, variant: str | None = None) -> Callable[..., Any]:
    """Return the function that runs `op` on `device`.

    Raises
    ------
    InvalidInputError
        `variant` is not the name of a variant.
    VariantUnavailableError
        The named variant, or every variant, cannot run here.
    """
    variants = _table[op]
    named = variant or os.environ.get("FLCORE_BACKEND") or None
    if named is not None:
        if named not in NAMES:
            raise InvalidInputError(f"variant: expected one of {', '.join(NAMES)}, got {named!r}")
        if named not in variants:
            raise VariantUnavailableError(f"{op} has no {named} variant, only {list(variants)}")
        if why := variants[named].missing(device):
            raise VariantUnavailableError(f"{op}: variant {named} cannot run on {device}: {why}")
        return variants[named].load()
    reasons: list[str] = []
    for name in ORDER[device.partition(":")[0]]:
        if name in variants:
            if not (why := variants[name].missing(device)):
                if reasons:
                    log.debug("%s on %s: %s (%s)", op, device, name, "; ".join(reasons))
                return variants[name].load()
            reasons.append(f"{name}: {why}")
    raise VariantUnavailableError(f"{op} cannot run on {device}: {'; '.join(reasons)}")


# ---- reasons shared by many ops ----------------------------------------------------------------


def cpu_only(device: str) -> str:
    """Reason of a variant that reads CPU memory only."""
    return "" if device == "cpu" else "it reads CPU memory only"


def needs_cuda(device: str) -> str:
    """Reason of a variant compiled by nvcc."""
    from flcore import _native

    if _native.cuda is None:
        return f"{_native.cuda_reason}; rebuild with FLCORE_CUDA=1 where nvcc is installed"
    return "" if device.startswith("cuda") else "it reads GPU memory only"


def needs_triton(device: str) -> str:
    """Reason of a Triton variant: a GPU, or the interpreter on the CPU."""
    import importlib.util

    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None:
        return "it needs triton and torch: pip install 'flcore[torch,triton]'"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU (or TRITON_INTERPRET=1, which is slow and for tests)"
    return ""
