"""Random numbers of a run.

Every draw has its own generator, made from the run's seed and from what the draw is for.  None is
carried from round to round, so a resumed run draws exactly what the uninterrupted one would have,
and the shuffles of a client do not depend on who else takes part.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

__all__ = ["Purpose", "generator"]


class Purpose(IntEnum):
    """What a stream of random numbers is for; the values are part of a run's identity."""

    PARTITION = 0
    MODEL = 1
    PARTICIPANTS = 2
    LOCAL_TRAINING = 3
    BASE = 4
    ATTACKERS = 5
    ATTACK = 6
    FAULTS = 7
    LABEL_NOISE = 8
    EXCHANGE = 9


def generator(seed: int, purpose: Purpose, round: int = 0, client: int = 0) -> np.random.Generator:
    """Give the generator of one purpose in one round at one client.

    Examples
    --------
    >>> a = generator(0, Purpose.LOCAL_TRAINING, round=3, client=7).integers(1000)
    >>> b = generator(0, Purpose.LOCAL_TRAINING, round=3, client=7).integers(1000)
    >>> bool(a == b)
    True
    """
    return np.random.default_rng([seed, int(purpose), round, client])
