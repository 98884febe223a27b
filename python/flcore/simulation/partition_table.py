"""A table of what a partition gives each client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flcore.errors import InvalidInputError
from flcore.simulation.partition import check_partition

__all__ = ["PartitionTable", "describe_partition"]


@dataclass(frozen=True)
class PartitionTable:
    """How many examples of each class each client has.

    Parameters
    ----------
    counts : (clients, classes) int64
    classes : tuple of str
        Name of each class.
    """

    counts: np.ndarray
    classes: tuple[str, ...]

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client, (clients,) int64."""
        return self.counts.sum(axis=1)

    @property
    def classes_per_client(self) -> np.ndarray:
        """Classes of which a client has any example, (clients,) int64."""
        return (self.counts > 0).sum(axis=1)

    @cached_property
    def skew(self) -> float:
        """Mean distance of a client's class frequencies from those of all data, 0 to 1.

        Half the sum of absolute differences: the share of a client's examples that would have to
        be exchanged for it to look like the whole.
        """
        whole = self.counts.sum(axis=0) / self.counts.sum()
        own = self.counts / self.sizes[:, np.newaxis]
        return float(np.abs(own - whole).sum(axis=1).mean() / 2)

    def rows(self, most: int = 20) -> list[list[str]]:
        """Give a heading, a row for each of the first `most` clients, and one for all."""
        names = [c if c.isprintable() and c.strip() else repr(c) for c in self.classes]
        body = [
            [str(client), *map(str, row.tolist()), str(row.sum())]
            for client, row in enumerate(self.counts[:most])
        ]
        total = self.counts.sum(axis=0)
        return [
            ["client", *names, "all"],
            *body,
            ["all", *map(str, total.tolist()), str(total.sum())],
        ]

    def to_markdown(self, most: int = 20) -> str:
        """Give `rows` as a table, with a line on the clients that it leaves out."""
        heading, *body = (
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
            for row in self.rows(most)
        )
        lines = [heading, "|" + "---:|" * (len(self.classes) + 2), *body]
        if len(self.counts) > most:
            lines += ["", f"The first {most} of {len(self.counts)} clients."]
        return "\n".join(lines) + "\n"


def describe_partition(
    labels: np.ndarray, partition: Sequence[np.ndarray], classes: Sequence[str] = ()
) -> PartitionTable:
    """Count the examples of each class at each client.

    Parameters
    ----------
    labels : (n,) integers from 0
    partition : list of index arrays
    classes : sequence of str, optional
        Names; default: the numbers.

    Raises
    ------
    InvalidInputError
        If a client has no data or an index does not exist, or names are missing.

    Examples
    --------
    >>> table = describe_partition([0, 0, 1, 1], [np.array([0, 1]), np.array([2, 3])])
    >>> print(table.to_markdown())
    | client | 0 | 1 | all |
    |---:|---:|---:|---:|
    | 0 | 2 | 0 | 2 |
    | 1 | 0 | 2 | 2 |
    | all | 2 | 2 | 4 |
    <BLANKLINE>
    >>> table.skew
    0.5
    """
    labels = np.asarray(labels)
    checked = check_partition(partition, len(labels))
    width = max(int(labels.max()) + 1, len(classes))
    if classes and len(classes) < width:
        raise InvalidInputError(
            f"classes: {len(classes)} names for labels that go up to {width - 1}"
        )
    counts = np.stack([np.bincount(labels[indices], minlength=width) for indices in checked])
    return PartitionTable(counts, tuple(classes) or tuple(map(str, range(width))))
