"""Federated algorithms, one class a file, each short enough to hold against its paper.

`available()` lists them by name and `create()` makes one from a name, as the command line does.
How a round runs is not here: see `flcore.simulation`.
"""

from __future__ import annotations

from typing import Any

from flcore.algorithms.base import Algorithm, StepSpec, local_steps
from flcore.algorithms.fedavg import FedAvg
from flcore.errors import InvalidInputError

__all__ = ["Algorithm", "FedAvg", "StepSpec", "available", "create", "local_steps"]


def available() -> dict[str, type[Algorithm]]:
    """Name of every algorithm and its class.

    Examples
    --------
    >>> sorted(available())
    ['fedavg']
    """
    return {cls.name: cls for cls in (FedAvg,)}


def create(name: str, **options: Any) -> Algorithm:
    """Make the algorithm called `name`, in any case, with `options` as its fields.

    Raises
    ------
    InvalidInputError
        If there is no such algorithm; the message lists those there are.
    """
    classes = available()
    if name.lower() not in classes:
        known = ", ".join(sorted(classes))
        raise InvalidInputError(f"algorithm: there is no {name!r}; choose one of: {known}")
    return classes[name.lower()](**options)
