"""What a server that sums increments knows of each client."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flcore.errors import InvalidInputError
from flcore.reference import wire

__all__ = ["Client", "positive", "read_client"]

_REMEMBERED = 16  # packets of a client by which a repetition is told from a restart


@dataclass
class Client:
    """What the server knows of one client."""

    weight: float
    packets: int = 0  # taken, which is the epoch of the next
    waiting: bool = False  # for a resync: nothing else is taken
    empty: bool = True  # whether its h is still 0
    recent: list[tuple[int, int]] = field(default_factory=list)  # epoch and checksum
    h: np.ndarray | None = None

    def remember(self, header: wire.Header) -> None:
        self.recent = [*self.recent[1 - _REMEMBERED :], (header.epoch, header.crc)]
        self.packets = (header.epoch + 1) % 2**32
        self.waiting = self.empty = False


def read_client(facts: Mapping[str, Any]) -> Client:
    return Client(
        positive(facts["weight"], "weight"),
        int(facts["packets"]),
        bool(facts["waiting"]),
        bool(facts["empty"]),
        [(int(epoch), int(crc)) for epoch, crc in facts["recent"]],
    )


def positive(value: Any, name: str) -> float:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise InvalidInputError(f"{name}: expected a positive finite number, got {value!r}")
    return float(value)
