"""Paired timing: contestants take turns call by call, and only ratios within a round are compared.

Timing all of A and then all of B measures the machine as much as the code: a function timed that
way against itself was off by up to 26 %.  Taking turns call by call, and taking the median of the
ratios within each round, brings that below 1 % even beside two busy processes, because whatever
disturbs a round disturbs every contestant in it.

A run has four steps, all in `run_paired`: verify, warm up, share out the time, take turns.
Timers for the host are here; the CUDA timer is in `flcore.bench.cuda`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

__all__ = [
    "Contestant",
    "HostTimer",
    "Interval",
    "PairedTimes",
    "Plan",
    "Timer",
    "VerificationError",
    "median_interval",
    "run_paired",
]


# Calls of a few microseconds may never settle within 5 %.
MAX_WARM_UP_CALLS = 500


class VerificationError(AssertionError):
    """Our own result differs from the reference: nothing is timed."""


class Timer(Protocol):
    """Anything that can time one call."""

    def measure(self, call: Callable[[int], Any], slot: int) -> float:
        """Return the seconds that `call(slot)` took."""


class HostTimer:
    """Wall-clock time of one call on the host.

    Parameters
    ----------
    clock : callable, optional
        Returns nanoseconds; `time.perf_counter_ns` unless a test passes its own.
    """

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock

    def measure(self, call: Callable[[int], Any], slot: int) -> float:
        """Return the seconds of `call(slot)`; allocating the result counts, freeing it does not."""
        start = self._clock()
        result = call(slot)
        stop = self._clock()
        del result
        return (stop - start) * 1e-9


def _to_numpy(result: Any) -> np.ndarray:
    return np.asarray(result)


@dataclass(frozen=True)
class Contestant:
    """One way of doing the work of a case.

    Attributes
    ----------
    name : str
        As it is printed.
    call : callable
        `call(slot)` does the work once on input set number `slot`.
    to_numpy : callable
        Turns what `call` returns into an array to verify; never timed.
    reset : callable, optional
        Puts mutable state (error memory, accumulator) back to its start; never timed.
    matches : callable, optional
        Replaces the case's check for a contestant that computes something else by design,
        such as an unweighted mean.  `matches(slot, array)` returns None or what is wrong.
    kind : str
        "ours", "variant" (ours with other options), "peer" or "probe" (a bandwidth measurement).
    rest_s : float
        Seconds to wait, untimed, after a call whose thread pool spins on when the work is done:
        it would take a core from whoever comes next.
    """

    name: str
    call: Callable[[int], Any]
    to_numpy: Callable[[Any], np.ndarray] = _to_numpy
    reset: Callable[[], None] | None = None
    matches: Callable[[int, np.ndarray], str | None] | None = None
    kind: str = "peer"
    rest_s: float = 0.0


@dataclass(frozen=True)
class Plan:
    """How long and how often to measure.

    Attributes
    ----------
    budget_s : float
        Seconds of timed calls, shared equally by the contestants of one case.
    warmup_s : float
        Longest warm-up of one contestant.
    rounds, min_rounds : int
        Every contestant takes part in `rounds` rounds, or in fewer (never under `min_rounds`)
        when it is too slow for its share of the budget.
    max_rounds : int
        Fast contestants use up their share of the budget until this number.
    seed : int
        Of the order within the rounds and of the bootstrap.
    """

    budget_s: float = 15.0
    warmup_s: float = 2.0
    rounds: int = 30
    min_rounds: int = 7
    max_rounds: int = 200
    seed: int = 0

    @classmethod
    def quick(cls) -> Plan:
        """For a look in passing: about a second a case, wide intervals."""
        return cls(budget_s=1.5, warmup_s=0.2, max_rounds=30)

    def rounds_for(self, seconds_per_call: float, contestants: int) -> int:
        """Return the rounds that fit into one contestant's share of the budget."""
        fits = self.budget_s / contestants / max(seconds_per_call, 1e-9)
        return int(min(max(fits, self.min_rounds), self.max_rounds))


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


def _problem(
    contestant: Contestant, matches: Callable[[int, np.ndarray], str | None], slots: Sequence[int]
) -> str | None:
    """Run `contestant` once per slot from its start state; None, or why it must not be timed."""
    check = contestant.matches or matches
    if contestant.reset is not None:
        contestant.reset()
    for slot in slots:
        wrong = check(slot, contestant.to_numpy(contestant.call(slot)))
        if wrong is not None:
            return f"wrong result: {wrong}"
    if contestant.reset is not None:
        contestant.reset()
    return None


def _warm_up(measure_next: Callable[[], float], limit_s: float) -> float:
    """Call until the last ten calls agree within 5 % with the ten before; median of the last ten.

    Stops at `limit_s` seconds or 500 calls, and never before the second call.
    """
    times: list[float] = []
    while True:
        times.append(measure_next())
        recent = float(np.median(times[-10:]))
        if len(times) >= 20 and abs(recent / float(np.median(times[-20:-10])) - 1) <= 0.05:
            return recent
        if len(times) >= 2 and (sum(times) >= limit_s or len(times) >= MAX_WARM_UP_CALLS):
            return recent


def _takes_part(round_number: int, rounds: int, of: int) -> bool:
    """Spread `rounds` turns evenly over `of` rounds."""
    return (round_number + 1) * rounds // of > round_number * rounds // of


def run_paired(
    contestants: Sequence[Contestant],
    matches: Callable[[int, np.ndarray], str | None],
    *,
    plan: Plan | None = None,
    timer: Timer | None = None,
    slots: int = 1,
    verify_slots: Sequence[int] = (0,),
    prime: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> PairedTimes:
    """Verify, warm up and time the contestants in turns.

    Parameters
    ----------
    contestants : sequence of Contestant
        The first is ours, the yardstick; it takes part in every round.
    matches : callable
        `matches(slot, array)` returns None when the result is right, else what is wrong with it.
    plan : Plan, optional
    timer : Timer, optional
        `HostTimer()` unless given.
    slots : int
        Number of input sets.  Every call takes the set that was used longest ago, so that with
        enough of them no contestant finds its input in cache ("cold").
    verify_slots : sequence of int
        Calls made, in this order and from the start state, to verify a contestant.
    prime : bool
        Make an untimed call before each timed one: inputs and threads are warm ("hot").
    progress : callable, optional
        `progress(stage, fraction)`, called outside the timed calls only.

    Returns
    -------
    PairedTimes
        Peers that fail or give a wrong result are in `refused`, never in the times.

    Raises
    ------
    VerificationError
        If the result of the first contestant is wrong.
    """
    plan = plan or Plan()
    timer = timer or HostTimer()
    tell = progress or (lambda stage, fraction: None)

    admitted: list[Contestant] = []
    refused: dict[str, str] = {}
    for number, contestant in enumerate(contestants):
        tell(f"verify {contestant.name}", 0.0)
        try:
            problem = _problem(contestant, matches, verify_slots)
        except Exception as error:
            if number == 0:
                raise
            # a peer may fail for its own reasons (no compiler, no memory): that goes on record
            problem = (
                f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            )
        if problem is None:
            admitted.append(contestant)
        elif number == 0:
            raise VerificationError(f"{contestant.name}: {problem}")
        else:
            refused[contestant.name] = problem

    used = 0

    def measure(contestant: Contestant) -> float:
        nonlocal used
        slot = used % slots
        used += 1
        if prime and contestant.kind != "probe":
            contestant.call(slot)
        return timer.measure(contestant.call, slot)

    wanted = []
    for contestant in admitted:
        tell(f"warm up {contestant.name}", 0.0)
        per_call = _warm_up(partial(measure, contestant), plan.warmup_s)
        time.sleep(contestant.rest_s)
        wanted.append(plan.rounds_for(per_call, len(admitted)))

    total = max(wanted)
    wanted[0] = total
    seconds = np.full((len(admitted), total), np.nan)
    order_rng = np.random.default_rng(plan.seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(total):
            tell("measure", turn / total)
            players = [i for i, rounds in enumerate(wanted) if _takes_part(turn, rounds, total)]
            for i in order_rng.permutation(players):
                seconds[i, turn] = measure(admitted[i])
                time.sleep(admitted[i].rest_s)
    finally:
        if collecting:
            gc.enable()
    tell("measure", 1.0)
    names = [contestant.name for contestant in admitted]
    return PairedTimes(names, seconds, refused, plan.rounds, plan.seed)
