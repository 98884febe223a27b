"""Client rows for the robust rules, with some bad ones, and the check of a rule's result.

Good rows are normal noise, each client's of its own size; bad rows are shifted in every
coordinate.  Distances between rows then differ by far more than float32 rounds, so that all
libraries select the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from flcore.bench.cases import Setup, difference
from flcore.bench.rules_expected import EXPECTED, Expected, Rows, gram_of

__all__ = ["Clients", "make_clients"]

# Coordinates whose values are compared with the definition.
SAMPLE = 20_000

# Bad rows lie this many standard deviations off, in every coordinate.
SHIFT = 3.0

# Of the largest value of a coordinate.  Coefficients that come from float32 distances are off by
# some units of 1e-7 each; a wrong row or a wrong window is off by 1e-2.
TOLERANCE = 2e-6


@dataclass
class Clients:
    """Rows of one case.

    Attributes
    ----------
    stacked : list of (n, numel) float32
        One matrix a slot; the last `bad` rows are shifted.
    bad : int
    sample : (m,) int64
        Coordinates that are compared.
    """

    stacked: list[np.ndarray]
    bad: int
    sample: np.ndarray
    _rows: dict[int, Rows] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Coordinates of one row."""
        return int(self.stacked[0].shape[1])

    def rows(self, slot: int) -> Rows:
        """Return what the definitions need of one input set, computed once."""
        if slot not in self._rows:
            matrix = self.stacked[slot]
            sample = matrix[:, self.sample].astype(np.float64)
            self._rows[slot] = Rows(gram_of(matrix), sample, self.numel)
        return self._rows[slot]

    def expected(self, rule: str, slot: int = 0, f: int | None = None) -> Expected:
        """Result of `rule`, with all the bad rows as its `f` unless given."""
        return EXPECTED[rule](self.rows(slot), self.bad if f is None else f)

    def check(
        self,
        rule: str,
        definition: Callable[[Rows, int], Expected] | None = None,
        f: int | None = None,
    ) -> Callable[[int, np.ndarray], str | None]:
        """Return a check against the definition of `rule`, or the one given."""
        define, f = definition or EXPECTED[rule], self.bad if f is None else f

        def matches(slot: int, result: np.ndarray) -> str | None:
            if result.shape != (self.numel,):
                return f"shape {result.shape}, expected {(self.numel,)}"
            rows = self.rows(slot)
            allowed = TOLERANCE * np.abs(rows.sample).max(axis=0)
            return difference(result[self.sample], define(rows, f).values, allowed)

        return matches

    def loose_check(self, rule: str, allowed_rms: float) -> Callable[[int, np.ndarray], str | None]:
        """Return a check of the root mean square difference, for results that are random."""

        def matches(slot: int, result: np.ndarray) -> str | None:
            off = result[self.sample] - self.expected(rule, slot).values
            rms = float(np.sqrt(np.mean(off**2)))
            return None if rms <= allowed_rms else f"off by {rms:.3g} rms, allowed {allowed_rms}"

        return matches


def make_clients(setup: Setup, clients: int, numel: int, bad: int) -> Clients:
    """Random rows, in as many sets as it takes to keep them out of cache."""
    rng = setup.rng()
    size = rng.permutation(np.linspace(0.9, 1.1, clients)).astype(np.float32)
    stacked = []
    for _ in range(setup.cold_slots(4 * clients * numel)):
        matrix = rng.standard_normal((clients, numel), dtype=np.float32)
        matrix *= size[:, None]
        matrix[clients - bad :] += np.float32(SHIFT)
        stacked.append(matrix)
    sample = np.sort(rng.choice(numel, size=min(SAMPLE, numel), replace=False))
    return Clients(stacked, bad, sample)
