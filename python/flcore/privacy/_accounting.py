"""What the noise of `DPMean` is worth: (epsilon, delta) by the dp-accounting package."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from flcore import _extras
from flcore.aggregation._checks import number, whole
from flcore.errors import InvalidInputError

__all__ = ["epsilon", "noise_multiplier_for"]

NEIGHBOURING = ("add_or_remove", "zero_out", "replace")
SAMPLING = ("poisson", "fixed")
ACCOUNTANTS = ("rdp", "pld")
LARGEST = 2.0**20  # noise multipliers beyond which no calibration looks


def epsilon(
    noise_multiplier: float,
    sampling_rate: float,
    rounds: int,
    delta: float,
    *,
    neighbouring: str = "add_or_remove",
    sampling: str = "poisson",
    accountant: str = "rdp",
) -> float:
    r"""Privacy loss epsilon, at `delta`, of `rounds` sums of clipped updates with Gaussian noise.

    Parameters
    ----------
    noise_multiplier : float
        z >= 0: standard deviation of the noise on the sum over the largest norm C of one client's
        term, as for `DPMean`. For adaptive clipping it is the total z given to `DPMean`, which
        covers the noise on the counts too.
    sampling_rate : float
        q in (0, 1]: share of the clients that take part in a round.
    rounds : int
        How many rounds.
    delta : float
        In (0, 1); below one over the number of clients to mean anything.
    neighbouring : {"add_or_remove", "zero_out", "replace"}
        Which two runs must look alike: with and without a client; with a client's update and with a
        zero in its place (so that the number of clients may be public); with one client and
        another in its place, where the sum moves by 2 C.
    sampling : {"poisson", "fixed"}
        Each client decides by itself with probability q, or a fixed number of clients is drawn
        without replacement. These are different mechanisms, and the bound for one is no bound for
        the other.
    accountant : {"rdp", "pld"}
        Renyi differential privacy, or privacy loss distributions, which are tighter and slower.

    Returns
    -------
    float
        An upper bound; infinite for ``noise_multiplier=0``.

    Raises
    ------
    InvalidInputError
        A number outside its range, or a combination for which dp-accounting has no bound: Poisson
        sampling with "replace" needs "pld" (or q = 1), fixed-size sampling needs "rdp" and
        "replace".
    MissingDependencyError
        dp-accounting is not installed (``pip install 'flcore[privacy]'``).

    Notes
    -----
    `noise_multiplier` keeps one meaning here. The package's Renyi accountant takes the deviation
    over the sensitivity, whatever the neighbours, its PLD accountant over C: under "replace" the
    first is handed z / 2.

    The bounds are for noise from the continuous normal law and exact arithmetic; see the notes of
    `DPMean` for what floating point leaves of that.

    References
    ----------
    Mironov, Talwar, Zhang, "Renyi differential privacy of the sampled Gaussian mechanism",
    arXiv 1908.10530. Wang, Balle, Kasiviswanathan, "Subsampled Renyi differential privacy and
    analytical moments accountant", AISTATS 2019. Koskela, Jalko, Honkela, "Computing tight
    differential privacy guarantees using FFT", AISTATS 2020.

    Examples
    --------
    >>> from flcore.privacy import epsilon
    >>> round(epsilon(1.0, 0.01, rounds=1000, delta=1e-5), 3)
    2.101
    """
    z = number("noise_multiplier", noise_multiplier, 0)
    measure = _measure(sampling_rate, rounds, delta, neighbouring, sampling, accountant)
    return measure(z)


def noise_multiplier_for(
    epsilon: float,
    sampling_rate: float,
    rounds: int,
    delta: float,
    *,
    neighbouring: str = "add_or_remove",
    sampling: str = "poisson",
    accountant: str = "rdp",
    tolerance: float = 1e-3,
) -> float:
    """Smallest noise multiplier whose `epsilon` is at most the one given.

    Parameters
    ----------
    epsilon : float
        Positive.
    sampling_rate, rounds, delta, neighbouring, sampling, accountant
        As for `flcore.privacy.epsilon`; at least one round.
    tolerance : float
        The result is at most this fraction above the smallest that would do, never below it.

    Returns
    -------
    float

    Raises
    ------
    InvalidInputError, MissingDependencyError
        As `flcore.privacy.epsilon`; also when no multiplier up to 2^20 is enough.

    Examples
    --------
    >>> from flcore.privacy import noise_multiplier_for
    >>> round(noise_multiplier_for(2.0, 0.01, rounds=1000, delta=1e-5), 2)
    1.02
    """
    target = number("epsilon", epsilon, 0, open="low")
    tolerance = number("tolerance", tolerance, 0, 1, open="both")
    whole("rounds", rounds, 1)
    measure = _measure(sampling_rate, rounds, delta, neighbouring, sampling, accountant)
    high = 1.0
    while measure(high) > target:
        high *= 2
        if high > LARGEST:
            raise InvalidInputError(
                f"epsilon: no noise multiplier up to 2^20 reaches {target:g} at delta {delta:g}; "
                "allow a larger epsilon, fewer rounds or a smaller sampling rate"
            )
    low = high / 2
    while measure(low) <= target:  # ends: epsilon grows without bound as the noise goes to 0
        low, high = low / 2, low
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if measure(middle) <= target else (middle, high)
    return high


def _measure(
    sampling_rate: float,
    rounds: int,
    delta: float,
    neighbouring: str,
    sampling: str,
    accountant: str,
) -> Callable[[float], float]:
    """Return epsilon as a function of the noise multiplier; all else is checked here."""
    q = number("sampling_rate", sampling_rate, 0, 1, open="low")
    rounds = whole("rounds", rounds, 0)
    delta = number("delta", delta, 0, 1, open="both")
    for name, value, allowed in (
        ("neighbouring", neighbouring, NEIGHBOURING),
        ("sampling", sampling, SAMPLING),
        ("accountant", accountant, ACCOUNTANTS),
    ):
        if value not in allowed:
            raise InvalidInputError(f"{name}: expected one of {allowed}, got {value!r}")
    sampled = q < 1  # with everybody present there is nothing to amplify, and any neighbour is fine
    if sampled and sampling == "fixed" and (neighbouring != "replace" or accountant != "rdp"):
        raise InvalidInputError(
            "sampling: a fixed number of clients is bounded for neighbouring='replace' and "
            f"accountant='rdp' only, got {neighbouring!r} and {accountant!r}"
        )
    if sampled and sampling == "poisson" and neighbouring == "replace" and accountant == "rdp":
        raise InvalidInputError(
            "neighbouring: 'replace' under Poisson sampling is bounded by accountant='pld' only"
        )
    dp = _extras.require("dp_accounting", extra="privacy")
    module = _extras.require(f"dp_accounting.{accountant}", extra="privacy")
    relation = {
        "add_or_remove": dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
        "zero_out": dp.NeighboringRelation.REPLACE_SPECIAL,
        "replace": dp.NeighboringRelation.REPLACE_ONE,
    }[neighbouring]
    drawn, of = q.as_integer_ratio()  # the accountant looks at their ratio alone

    def event(z: float) -> Any:
        if accountant == "rdp" and neighbouring == "replace":
            z /= 2
        gaussian = dp.GaussianDpEvent(z)
        if not sampled:
            return gaussian
        if sampling == "poisson":
            return dp.PoissonSampledDpEvent(q, gaussian)
        return dp.SampledWithoutReplacementDpEvent(of, drawn, gaussian)

    def measure(z: float) -> float:
        if rounds == 0:
            return 0.0
        if z == 0:
            return math.inf
        make = module.RdpAccountant if accountant == "rdp" else module.PLDAccountant
        spent = make(neighboring_relation=relation).compose(event(z), rounds)
        return float(spent.get_epsilon(delta))

    return measure
