"""The field of peers of one case: those that can run, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.bench.timers import Contestant
from flcore.bench.updates import to_numpy

__all__ = ["Absent", "Field"]

Absent = dict[str, str]
Check = Callable[[int, np.ndarray], "str | None"]


class Field:
    """Collects peers and the reasons of the absent ones."""

    def __init__(self) -> None:
        self.peers: list[Contestant] = []
        self.absent: Absent = {}

    def add(
        self,
        name: str,
        call: Callable[[int], Any],
        matches: Check | None = None,
        rest_s: float = 0.0,
    ) -> None:
        """Add a peer; the arguments are those of `Contestant`."""
        self.peers.append(Contestant(name, call, to_numpy, matches=matches, rest_s=rest_s))

    def leave_out(self, reason: str, *names: str) -> None:
        """Put peers on record that cannot run."""
        self.absent |= dict.fromkeys(names, reason)
