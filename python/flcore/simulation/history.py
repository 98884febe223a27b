"""The record of a run: one `RoundRecord` a round, and the line of JSON it becomes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from flcore.algorithms.base import Parameters

__all__ = ["PHASES", "History", "RoundRecord", "summary"]

PHASES = {
    "train": "local training",
    "encode": "encode",
    "aggregate": "aggregate",
    "evaluate": "evaluate",
}
"""Phases of a round in order, and how they are called; the first two are the clients'."""


@dataclass(frozen=True)
class RoundRecord:
    """What one round did.

    Parameters
    ----------
    round : int
        Counted from 1.
    accuracy, loss : float
        Of the global model after the round on the test data; accuracy is 0 to 1.
    train_loss : float
        Mean over the participants of their mean loss during local training.
    clients : tuple of int
        Who took part.
    bytes_up, bytes_down : int
        Bytes of all messages of this round, from the clients and to them.
    seconds : dict
        Time spent in each of `PHASES`, in seconds.
    """

    round: int
    accuracy: float
    loss: float
    train_loss: float
    clients: tuple[int, ...]
    bytes_up: int
    bytes_down: int
    seconds: dict[str, float]

    def to_json(self) -> str:
        """Give the record as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> RoundRecord:
        """Read what `to_json` wrote."""
        values = json.loads(line)
        return cls(**{**values, "clients": tuple(values["clients"])})


@dataclass
class History:
    """All rounds of a run so far, and the global model after the last.

    Parameters
    ----------
    records : list of RoundRecord
    model : dict of float32 arrays
    config : dict
        Algorithm, model, data and settings as plain values: the content of `config.json`.
    """

    records: list[RoundRecord] = field(default_factory=list)
    model: Parameters = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[RoundRecord]:
        return iter(self.records)

    def __getitem__(self, index: int) -> RoundRecord:
        return self.records[index]

    @property
    def complete(self) -> bool:
        """Whether all rounds were run."""
        return len(self) >= self.config["settings"]["rounds"]

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last round, 0 to 1."""
        return self.records[-1].accuracy

    @property
    def bytes_up(self) -> int:
        """Bytes that clients sent, all rounds together."""
        return sum(record.bytes_up for record in self.records)

    @property
    def bytes_down(self) -> int:
        """Bytes that the server sent, all rounds together."""
        return sum(record.bytes_down for record in self.records)

    @property
    def bytes_dense(self) -> int:
        """Bytes that clients would have sent as plain float32 updates."""
        parameters = self.config["model"]["parameters"]
        return 4 * parameters * sum(len(record.clients) for record in self.records)

    def bytes_to(self, accuracy: float) -> int | None:
        """Bytes sent both ways until a round first reaches this accuracy; None if none does."""
        rounds = self.rounds_to(accuracy)
        if rounds is None:
            return None
        return sum(r.bytes_up + r.bytes_down for r in self.records[:rounds])

    def mean_accuracy(self, last: int = 10) -> float:
        """Mean test accuracy over the last rounds, which a single round's noise moves less."""
        recent = self.records[-last:]
        return sum(record.accuracy for record in recent) / len(recent)

    def rounds_to(self, accuracy: float) -> int | None:
        """First round that reaches this accuracy; None if none does."""
        return next((r.round for r in self.records if r.accuracy >= accuracy), None)

    def seconds(self) -> dict[str, float]:
        """Time in each phase, all rounds together, in seconds."""
        return {phase: sum(r.seconds[phase] for r in self.records) for phase in PHASES}


def summary(history: History) -> list[tuple[str, str]]:
    """Give the final table of a run as rows of name and value, with units."""
    seconds = history.seconds()
    reached = {target: history.rounds_to(target) for target in (0.9, 0.95)}
    return [
        ("test accuracy, last round", f"{history.accuracy:.2%}"),
        (f"mean of the last {min(10, len(history))} rounds", f"{history.mean_accuracy(10):.2%}"),
        ("best round", f"{max(record.accuracy for record in history):.2%}"),
        *(
            (f"rounds to {target:.0%}", "not reached" if first is None else str(first))
            for target, first in reached.items()
        ),
        *_base_rows(history.config["model"].get("base")),
        ("uplink", f"{history.bytes_up / 1e6:.2f} MB"),
        ("uplink, against float32", f"{history.bytes_dense / history.bytes_up:.1f} x smaller"),
        ("downlink", f"{history.bytes_down / 1e6:.2f} MB"),
        *((f"time, {name}", f"{seconds[phase]:.2f} s") for phase, name in PHASES.items()),
    ]


def _base_rows(base: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Give the rows about a frozen base."""
    if base is None:
        return []
    return [
        ("base before training", f"{base['accuracy']:.2%}"),
        ("base in float32", f"{base['accuracy_float']:.2%}"),
        ("base, once to each client", f"{base['bytes'] / 1e6:.3f} MB"),
        ("the same in float32", f"{4 * base['parameters'] / 1e6:.3f} MB"),
    ]
