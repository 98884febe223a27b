"""ByzFL as an optional peer: its aggregators, without what its package imports beside them.

`import byzfl` also imports a training framework and a plotting suite, and with them torchvision,
matplotlib and seaborn.  The aggregators need NumPy, SciPy and torch only::

    pip install torch scipy
    pip install --no-deps byzfl==0.0.11

They are imported here under their own names and then taken out of `sys.modules` again, so that a
later `import byzfl` is the whole package as if nothing had happened.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["byzfl_aggregators"]


@functools.cache
def byzfl_aggregators() -> tuple[types.ModuleType | None, str]:
    """Import `byzfl.aggregators`: the rules and the pre-aggregators.

    Returns
    -------
    (module, "") or (None, reason), as `flcore.bench.environment.optional` does.
    """
    spec = importlib.util.find_spec("byzfl")
    if spec is None or spec.submodule_search_locations is None:
        return None, "not installed"
    try:
        with _without_package_init(list(spec.submodule_search_locations)):
            return importlib.import_module("byzfl.aggregators"), ""
    except Exception as error:
        return None, f"does not import: {type(error).__name__}: {error}"


@contextmanager
def _without_package_init(folders: list[str]) -> Iterator[None]:
    """Let `byzfl` be an empty package over its own folders; undo it afterwards."""
    before = {name: module for name, module in sys.modules.items() if _is_byzfl(name)}
    bare = types.ModuleType("byzfl")
    bare.__path__ = folders
    for name in before:
        del sys.modules[name]
    sys.modules["byzfl"] = bare
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _is_byzfl(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _is_byzfl(name: str) -> bool:
    return name == "byzfl" or name.startswith("byzfl.")
