"""Clients that lie: what attackers send in the place of their updates.

An attacker trains as everybody does. What it sends is made of its own update and, for attacks that
several attackers plan together, of the updates of the honest participants of the round, which they
are taken to know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import numpy as np

from flcore.algorithms.base import check_number
from flcore.algorithms.layout import Vector
from flcore.compression._settings import Settings, from_text
from flcore.errors import InvalidInputError

__all__ = [
    "ALIE",
    "ATTACKS",
    "Attack",
    "GaussianNoise",
    "InnerProduct",
    "LabelFlip",
    "Seen",
    "SignFlip",
    "attack_from_text",
    "check_attackers",
]


@dataclass(frozen=True)
class Seen:
    """What an attacker knows of a round.

    Parameters
    ----------
    own : (d,) array
        Its own update.
    honest : list of (d,) arrays
        Updates of the honest participants.
    attackers : int
        Number of attackers among the participants.
    rng : numpy.random.Generator
        Of this attacker in this round.
    """

    own: Vector
    honest: Sequence[Vector]
    attackers: int
    rng: np.random.Generator


@dataclass(frozen=True)
class Attack(Settings):
    """Base of the attacks."""

    family: ClassVar[str] = "attack"

    def update(self, seen: Seen) -> Vector:
        """Give what an attacker sends, (d,)."""
        return seen.own

    def labels(self, y: np.ndarray, classes: int) -> np.ndarray:
        """Give the labels that an attacker trains on."""
        return y


@dataclass(frozen=True)
class SignFlip(Attack):
    """Send ``-scale`` times the own update (Li et al., "RSA", AAAI 2019, arXiv 1811.03761)."""

    name: ClassVar[str] = "sign-flip"

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("scale", self.scale, lambda v: v > 0, "a number above 0")

    def update(self, seen: Seen) -> Vector:
        """Give the own update turned round."""
        return np.asarray(-self.scale, seen.own.dtype) * seen.own


@dataclass(frozen=True)
class ALIE(Attack):
    r"""A little is enough (Baruch et al., NeurIPS 2019, arXiv 1902.06156): ``mean - z std``.

    Mean and standard deviation are those of the honest updates, by coordinate.  With n participants
    and f attackers, :math:`s = \lfloor n/2 \rfloor + 1 - f` honest ones must be further out for the
    attackers to be in the majority, so that :math:`z = \Phi^{-1}((n - f - s) / (n - f))`.

    Parameters
    ----------
    z : float or None
        None: by the formula.
    """

    name: ClassVar[str] = "alie"

    z: float | None = None

    def __post_init__(self) -> None:
        if self.z is not None:
            check_number("z", self.z, lambda v: True, "a number, or None for the paper's")

    def deviations(self, participants: int, attackers: int) -> float:
        """Give z for so many participants, attackers among them."""
        if self.z is not None:
            return self.z
        honest = participants - attackers
        further = participants // 2 + 1 - attackers
        share = (honest - further) / honest if honest else 0.0
        return NormalDist().inv_cdf(min(max(share, 1e-3), 1 - 1e-3))

    def update(self, seen: Seen) -> Vector:
        """Give a vector that hides in the spread of the honest ones; the own if it is alone."""
        if not seen.honest:
            return seen.own
        rows = np.stack(seen.honest)
        z = self.deviations(len(rows) + seen.attackers, seen.attackers)
        return (rows.mean(0) - z * rows.std(0)).astype(seen.own.dtype)


@dataclass(frozen=True)
class InnerProduct(Attack):
    """Send ``-scale`` times the mean of the honest updates (Xie et al., UAI 2019).

    "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation",
    arXiv 1903.03936.
    """

    name: ClassVar[str] = "inner-product"

    scale: float = 0.5

    def __post_init__(self) -> None:
        check_number("scale", self.scale, lambda v: v > 0, "a number above 0")

    def update(self, seen: Seen) -> Vector:
        """Give the honest mean turned round; the own if there is no honest one."""
        mean = np.mean(np.stack(seen.honest), axis=0) if seen.honest else seen.own
        return (-self.scale * mean).astype(seen.own.dtype)


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Train on labels ``C - 1 - y`` and send what comes of it."""

    name: ClassVar[str] = "label-flip"

    def labels(self, y: np.ndarray, classes: int) -> np.ndarray:
        """Give the labels in reverse order."""
        return classes - 1 - y


@dataclass(frozen=True)
class GaussianNoise(Attack):
    """Send normal noise in the place of the update.

    Parameters
    ----------
    scale : float
        Standard deviation of a coordinate, in root mean squares of the own update.
    """

    name: ClassVar[str] = "gaussian"

    scale: float = 10.0

    def __post_init__(self) -> None:
        check_number("scale", self.scale, lambda v: v > 0, "a number above 0")

    def update(self, seen: Seen) -> Vector:
        """Give noise."""
        own = seen.own
        size = math.sqrt(float(np.mean(np.square(own, dtype=np.float64))))
        return (seen.rng.standard_normal(own.shape) * (self.scale * size)).astype(own.dtype)


ATTACKS: dict[str, type[Attack]] = {
    cls.name: cls for cls in (SignFlip, ALIE, InnerProduct, LabelFlip, GaussianNoise)
}
"""Attacks by name."""


def attack_from_text(text: str) -> Attack:
    """Give the attack that a text describes, ``name`` or ``name:key=value``.

    Examples
    --------
    >>> attack_from_text("sign-flip:scale=2").scale
    2
    """
    try:
        return from_text(ATTACKS, text)
    except InvalidInputError as error:
        raise InvalidInputError(f"attack: {error}") from None


def check_attackers(attack: Attack | None, attackers: int | float, clients: int) -> int:
    """Give the number of attackers among all clients.

    Raises
    ------
    InvalidInputError
        If there are attackers and no attack, or the other way round, or nobody would be honest.
    """
    share = isinstance(attackers, float)
    count = round(attackers * clients) if share else int(attackers)
    if isinstance(attackers, bool) or count < 0 or (share and not 0 <= attackers < 1):
        raise InvalidInputError(
            f"attackers: expected a count from 0 or a share of the clients below 1, "
            f"got {attackers!r}"
        )
    if count >= clients > 0:
        raise InvalidInputError(f"attackers: {count} of {clients} clients: nobody would be honest")
    if (attack is None) != (count == 0):
        raise InvalidInputError(
            f"attackers: {count} attackers with attack={attack!r}: give both, or neither"
        )
    return count
