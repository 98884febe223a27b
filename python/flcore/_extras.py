"""Import of optional dependencies, with an error that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from flcore.errors import MissingDependencyError

__all__ = ["require"]


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which the extra `extra` of the package installs.

    Raises
    ------
    MissingDependencyError
        The module is not installed; the message holds the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        if err.name != module.split(".")[0]:
            raise  # installed, but something it needs is not: its own message says more
        raise MissingDependencyError(
            f"{module} is needed here and is not installed: pip install 'flcore[{extra}]'"
        ) from None
