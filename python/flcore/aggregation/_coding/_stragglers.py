"""Who is late: the bursty straggler model, and a Markov chain of slow and fast workers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from flcore.aggregation._checks import number, whole
from flcore.errors import InvalidInputError

__all__ = ["BurstyWindow", "GilbertElliott", "is_bursty"]


class BurstyWindow:
    r"""The last rounds of a straggler pattern, held against the (B, W, lambda)-bursty model.

    In every window of W rounds at most lambda distinct workers straggle, and each of them only
    within B consecutive rounds: a worker that is late now was not late W - 1 to B rounds ago.

    Parameters
    ----------
    n : int
        Workers.
    burst, window, lam : int
        B, W and lambda, ``1 <= B < W`` and ``0 <= lambda <= n``.

    References
    ----------
    Krishnan, Ebrahimi, Khisti, "Sequential Gradient Coding For Straggler Mitigation", ICLR 2023.
    """

    def __init__(self, n: int, burst: int, window: int, lam: int) -> None:
        self.n = whole("n", n, 1)
        self.burst = whole("burst", burst, 1)
        self.window = whole("window", window, self.burst + 1)
        self.lam = whole("lam", lam, 0, self.n)
        self._past: deque[np.ndarray] = deque(maxlen=self.window - 1)

    def allows(self, stragglers: np.ndarray) -> bool:
        """Whether the pattern stays within the model when these workers are late now."""
        seen, too_far_back = stragglers.copy(), len(self._past) - self.burst + 1
        for age, past in enumerate(self._past):  # oldest first
            if age < too_far_back and (past & stragglers).any():
                return False
            seen |= past
        return int(seen.sum()) <= self.lam

    def push(self, stragglers: np.ndarray) -> None:
        """Take the round into the past."""
        self._past.append(stragglers)


def is_bursty(pattern: Any, burst: int, window: int, lam: int) -> bool:
    """Whether a whole straggler pattern follows the (B, W, lambda)-bursty model.

    Parameters
    ----------
    pattern : (rounds, n) bool
        True where a worker is late.
    burst, window, lam : int
        See `BurstyWindow`.

    Raises
    ------
    InvalidInputError
        Shapes or parameters that cannot be used.

    Examples
    --------
    >>> pattern = [[1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0]]
    >>> is_bursty(pattern, burst=2, window=3, lam=1), is_bursty(pattern, burst=1, window=3, lam=1)
    (True, False)
    """
    rows = np.asarray(pattern, dtype=bool)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise InvalidInputError(f"pattern: expected shape (rounds, n), got {rows.shape}")
    past = BurstyWindow(rows.shape[1], burst, window, lam)
    for row in rows:
        if not past.allows(row):
            return False
        past.push(row)
    return True


@dataclass(frozen=True, kw_only=True)
class GilbertElliott:
    """Workers that turn slow and recover, each on its own: a two-state Markov chain.

    Parameters
    ----------
    fail, recover : float
        Probabilities of turning slow, and of turning fast again, from one round to the next. A
        worker is slow for ``1 / recover`` rounds on average.
    slow : float
        Time factor of a slow worker, at least 1.

    References
    ----------
    Gilbert, "Capacity of a burst-noise channel", Bell System Technical Journal 1960; Elliott 1963.
    """

    fail: float = 0.02
    recover: float = 0.5
    slow: float = 5.0

    def __post_init__(self) -> None:
        number("fail", self.fail, 0, 1)
        number("recover", self.recover, 0, 1, open="low")
        number("slow", self.slow, 1.0)

    def sample(self, n: int, rounds: int, seed: int = 0) -> np.ndarray:
        """Draw the time factors of `n` workers in each round; stationary from the first round.

        Returns
        -------
        (rounds, n) float64
            1 or `slow`. The same seed and n give the same rounds, however many are drawn.
        """
        n, rounds = whole("n", n, 1), whole("rounds", rounds, 0)
        rng = np.random.default_rng(seed)
        slow = rng.random(n) < self.fail / (self.fail + self.recover)
        factors = np.ones((rounds, n))
        for row in factors:
            row[slow] = self.slow
            draw = rng.random(n)
            slow = np.where(slow, draw >= self.recover, draw < self.fail)
        return factors
