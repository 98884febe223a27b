"""Partitions by name, as settings and the command line write them.

A text names one way of dealing, after which numbers follow a colon:

====================================  ===========================================================
``iid``                               `iid_partition`
``dirichlet:ALPHA``                   `dirichlet_partition`
``dirichlet-sizes:ALPHA[:LEAST]``     `dirichlet_sizes`
``pathological:CLASSES``              `pathological_partition`
``domain``                            `domain_partition`, of data with `Dataset.groups_train`
``natural[:LEAST]``                   `natural_partition`, of data with `Dataset.groups_train`
====================================  ===========================================================

``long-tail:IMBALANCE`` in front of it, with a comma, thins the training data by `long_tail` first:
``long-tail:50,dirichlet:0.1``.  Alone it deals what is left IID.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from flcore.errors import InvalidInputError
from flcore.simulation.datasets import Dataset
from flcore.simulation.groups import domain_partition, natural_partition
from flcore.simulation.partition import (
    dirichlet_partition,
    dirichlet_sizes,
    iid_partition,
    long_tail,
    pathological_partition,
)

__all__ = [
    "PARTITIONS",
    "Partition",
    "deal",
    "partition_from_text",
]

PARTITIONS = {
    "iid": "shuffled, equal sizes",
    "dirichlet:ALPHA": "own mixture of classes, equal sizes; the smaller, the fewer classes",
    "dirichlet-sizes:ALPHA[:LEAST]": "classes and sizes both differ, at least LEAST examples",
    "pathological:CLASSES": "so many shards of the examples sorted by label",
    "domain": "one domain a client, of data that names domains",
    "natural[:LEAST]": "one speaker, writer or other natural client of the data",
    "long-tail:IMBALANCE,...": "classes thinned exponentially before any of the others",
}
"""Text form of each partition and what it gives a client."""


class _Numbers(NamedTuple):
    """What may follow a name: one value, then the fewest examples of a client."""

    value: str | None
    least: bool


_KINDS = {
    "iid": _Numbers(None, False),
    "dirichlet": _Numbers("alpha", False),
    "dirichlet-sizes": _Numbers("alpha", True),
    "pathological": _Numbers("classes", False),
    "domain": _Numbers(None, False),
    "natural": _Numbers(None, True),
}


@dataclass(frozen=True)
class Partition:
    """A way of dealing examples to clients.

    Parameters
    ----------
    kind : str
        First word of a key of `PARTITIONS`.
    value : float or int, optional
        The Dirichlet concentration, or the number of shards of a client: where `kind` has one.
    least : int
        Fewest examples of a client, for ``"dirichlet-sizes"`` and ``"natural"``.
    imbalance : float, optional
        Factor of the long tail; None: the training data stays as it is.

    Raises
    ------
    InvalidInputError
        If a number is missing, not wanted or out of its range.

    Examples
    --------
    >>> Partition("dirichlet", 0.1, imbalance=50).to_text()
    'long-tail:50,dirichlet:0.1'
    """

    kind: str = "iid"
    value: float | None = None
    least: int = 1
    imbalance: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InvalidInputError(
                f"partition: there is no {self.kind!r}; choose one of: {', '.join(PARTITIONS)}"
            )
        wanted = _KINDS[self.kind]
        if wanted.value is None and self.value is not None:
            raise InvalidInputError(f"partition: {self.kind} takes no number, got {self.value!r}")
        if wanted.value == "alpha":
            _check_number(f"{self.kind}:ALPHA", self.value, above=0.0)
        if wanted.value == "classes":
            _check_whole(f"{self.kind}:CLASSES", self.value)
        if wanted.least:
            _check_whole(f"{self.kind}: LEAST", self.least)
        elif self.least != 1:
            raise InvalidInputError(
                f"partition: {self.kind} takes no least number of examples, got {self.least!r}"
            )
        if self.imbalance is not None:
            _check_number("long-tail:IMBALANCE", self.imbalance, least=1.0)

    @classmethod
    def from_alpha(cls, alpha: float | None) -> Partition:
        """Give ``dirichlet:alpha``, or ``iid`` for None."""
        return cls() if alpha is None else cls("dirichlet", alpha)

    def to_text(self) -> str:
        """Write it as `partition_from_text` reads it."""
        numbers = [] if self.value is None else [_number(self.value)]
        if self.least != 1:
            numbers.append(str(self.least))
        text = ":".join([self.kind, *numbers])
        return text if self.imbalance is None else f"long-tail:{_number(self.imbalance)},{text}"


def partition_from_text(text: str) -> Partition:
    """Read a partition as settings and the command line write it.

    Raises
    ------
    InvalidInputError
        Saying what was expected, and the part that is not it.

    Examples
    --------
    >>> partition_from_text("dirichlet-sizes:0.3:10")
    Partition(kind='dirichlet-sizes', value=0.3, least=10, imbalance=None)
    """
    first, *rest = (part.strip() for part in text.split(","))
    name, *numbers = first.split(":")
    if name == "long-tail":
        if len(numbers) != 1 or len(rest) > 1:
            raise InvalidInputError(
                "partition: expected long-tail:IMBALANCE, then one other partition after a comma, "
                f"got {text!r}"
            )
        imbalance = _parse(first, numbers[0])
        if rest and rest[0].split(":")[0] == "long-tail":
            raise InvalidInputError(f"partition: there is one long tail at most, got {text!r}")
        return replace(_one(rest[0] if rest else "iid"), imbalance=imbalance)
    if rest:
        raise InvalidInputError(
            f"partition: only long-tail:IMBALANCE may stand before a comma, got {text!r}"
        )
    return _one(first)


def deal(
    data: Dataset,
    clients: int,
    partition: Partition | str,
    rng: np.random.Generator,
    *,
    examples: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Deal the training examples of `data` to clients.

    With ``"iid"`` and ``"dirichlet:ALPHA"`` the draws are those of `split`.

    Parameters
    ----------
    data : Dataset
    clients : int
    partition : Partition, or its text
    rng : numpy.random.Generator
    examples : (m,) integers, optional
        Deal only these training examples; default: all.

    Returns
    -------
    list of `clients` int64 arrays of indices into the training data, disjoint, none empty.

    Raises
    ------
    InvalidInputError
        If a client would have no data, or the data lacks what the partition goes by.
    """
    how = partition_from_text(partition) if isinstance(partition, str) else partition
    pool = np.arange(len(data.y_train)) if examples is None else np.asarray(examples)
    if how.imbalance is not None:
        pool = pool[long_tail(data.y_train[pool], how.imbalance, rng)]
    labels = data.y_train[pool]
    if how.kind in ("domain", "natural"):
        if data.groups_train is None:
            raise InvalidInputError(
                f"partition: {how.kind} needs the group of each training example "
                f"(Dataset.groups_train), and the data set {data.name} has none"
            )
        groups = data.groups_train[pool]
        if how.kind == "domain":
            parts = domain_partition(groups, clients, rng)
        else:
            parts = natural_partition(groups, clients, rng, least=how.least)
    elif how.value is None:
        parts = iid_partition(labels, clients, rng)
    elif how.kind == "dirichlet":
        parts = dirichlet_partition(labels, clients, how.value, rng)
    elif how.kind == "dirichlet-sizes":
        parts = dirichlet_sizes(labels, clients, how.value, rng, least=how.least)
    else:
        parts = pathological_partition(labels, clients, int(how.value), rng)
    return [pool[indices] for indices in parts]


def _one(text: str) -> Partition:
    """Read one partition without a long tail in front."""
    kind, *numbers = text.split(":")
    if kind not in _KINDS:
        return Partition(kind)  # which says what there is
    wanted = _KINDS[kind]
    if len(numbers) > (wanted.value is not None) + wanted.least:
        raise InvalidInputError(f"partition: {kind} takes fewer numbers, got {text!r}")
    values: dict[str, Any] = {}
    if wanted.value is not None and numbers:
        values["value"] = _parse(text, numbers.pop(0), whole=wanted.value == "classes")
    if numbers:
        values["least"] = _parse(text, numbers.pop(0), whole=True)
    return Partition(kind, **values)


def _parse(text: str, number: str, *, whole: bool = False) -> Any:
    try:
        return int(number) if whole else float(number)
    except ValueError:
        raise InvalidInputError(
            f"partition: expected a {'whole ' * whole}number for {number!r} in {text!r}"
        ) from None


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _check_number(name: str, value: Any, *, above: float = -math.inf, least: float = 0.0) -> None:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (numeric and math.isfinite(value) and value > above and value >= least):
        wanted = f"a number from {least:g}" if above == -math.inf else f"a number above {above:g}"
        raise InvalidInputError(f"partition: {name}: expected {wanted}, got {value!r}")


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(f"partition: {name}: expected a whole number from 1, got {value!r}")
