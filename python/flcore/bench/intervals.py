"""What paired timing says: medians, ratios within rounds, and their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Interval", "PairedTimes", "median_interval"]


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Whether `value` lies within the interval."""
        return self.low <= value <= self.high

    def scaled(self, factor: float) -> Interval:
        """All three numbers times a positive `factor`."""
        return Interval(self.median * factor, self.low * factor, self.high * factor)


def median_interval(
    values: np.ndarray, seed: int = 0, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """Median of `values` and its percentile-bootstrap interval.

    Parameters
    ----------
    values : (n,) array, n >= 1
    seed : int
        The interval is a function of the values and this number alone.
    level : float
        Probability mass of the interval.
    resamples : int
        Number of bootstrap samples.

    Raises
    ------
    ValueError
        If `values` is empty.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("values: expected at least one number, got none")
    draws = np.random.default_rng(seed).integers(values.size, size=(resamples, values.size))
    medians = np.median(values[draws], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.median(values)), float(low), float(high))


@dataclass
class PairedTimes:
    """What `run_paired` measured.

    Attributes
    ----------
    names : list of str
        Contestants that were timed; the first one is the yardstick of all ratios.
    seconds : (contestants, rounds) float64
        NaN where a slow contestant sat a round out.
    refused : dict
        Contestants that were not timed, with the reason.
    full_rounds : int
        Rounds the plan asks for; a contestant with fewer was too slow for its share.
    """

    names: list[str]
    seconds: np.ndarray
    refused: dict[str, str] = field(default_factory=dict)
    full_rounds: int = 30
    seed: int = 0

    def _row(self, name: str) -> np.ndarray:
        return self.seconds[self.names.index(name)]

    def rounds(self, name: str) -> int:
        """Count the rounds in which `name` took part."""
        return int(np.isfinite(self._row(name)).sum())

    def quantiles(self, name: str) -> tuple[float, float, float]:
        """Return the 20, 50 and 80 % quantiles of the seconds of one call."""
        low, median, high = np.nanquantile(self._row(name), [0.2, 0.5, 0.8])
        return float(low), float(median), float(high)

    def ratio(self, name: str, to: str | None = None) -> Interval:
        """Time of `name` over the time of `to` (default: the first), paired within rounds.

        Above 1 means that `to` is faster.
        """
        pair_ratios = self._row(name) / self._row(self.names[0] if to is None else to)
        return median_interval(pair_ratios[np.isfinite(pair_ratios)], self.seed)

    def share(self, name: str, parts: Mapping[str, float]) -> Interval:
        """Time of a weighted sum of contestants over the time of `name`, paired within rounds.

        Parameters
        ----------
        name : str
        parts : mapping
            How much of one call of each contestant is added up, by its name.
        """
        total = np.sum([factor * self._row(part) for part, factor in parts.items()], axis=0)
        shares = total / self._row(name)
        return median_interval(shares[np.isfinite(shares)], self.seed)
