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
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from flcore.bench.intervals import PairedTimes

__all__ = [
    "Contestant",
    "HostTimer",
    "Plan",
    "Timer",
    "VerificationError",
    "run_paired",
]


# Calls of a few microseconds may never settle within 5 %.
MAX_WARM_UP_CALLS = 500

# A median of fewer says nothing about the spread.
FEWEST_ROUNDS = 3


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
    max_s : float
        Seconds of timed calls that a case may take when calls are so slow that `min_rounds` would
        exceed the budget; also shared equally.  Beyond its share of this a contestant gets fewer
        rounds than `min_rounds`, but never under three; a peer of which three calls exceed all of
        it is not timed.
    seed : int
        Of the order within the rounds and of the bootstrap.
    """

    budget_s: float = 15.0
    warmup_s: float = 2.0
    rounds: int = 30
    min_rounds: int = 7
    max_rounds: int = 200
    max_s: float = 60.0
    seed: int = 0

    @classmethod
    def quick(cls) -> Plan:
        """For a look in passing: about a second a case, wide intervals."""
        return cls(budget_s=1.5, warmup_s=0.2, max_rounds=30, max_s=15.0)

    def rounds_for(self, seconds_per_call: float, contestants: int) -> int:
        """Return the rounds that fit into one contestant's share of the budget."""
        calls_per_s = 1 / (contestants * max(seconds_per_call, 1e-9))
        least = max(min(self.min_rounds, self.max_s * calls_per_s), FEWEST_ROUNDS)
        return int(min(max(self.budget_s * calls_per_s, least), self.max_rounds))

    def too_slow(self, seconds_per_call: float) -> str | None:
        """Return why a peer is too slow to be timed, or None."""
        if FEWEST_ROUNDS * seconds_per_call <= self.max_s:
            return None
        return f"{seconds_per_call:.0f} s a call, too slow for {self.max_s:.0f} s a case"


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


def _verify(
    contestants: Sequence[Contestant],
    matches: Callable[[int, np.ndarray], str | None],
    slots: Sequence[int],
    tell: Callable[[str, float], None],
) -> tuple[list[Contestant], dict[str, str]]:
    """Split the contestants into those with right results and, with reasons, the others."""
    admitted: list[Contestant] = []
    refused: dict[str, str] = {}
    for number, contestant in enumerate(contestants):
        tell(f"verify {contestant.name}", 0.0)
        try:
            problem = _problem(contestant, matches, slots)
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
    return admitted, refused


def _warm_up(measure_next: Callable[[], float], limit_s: float) -> float:
    """Call until the last ten calls agree within 5 % with the ten before; median of the last ten.

    Stops at `limit_s` seconds or 500 calls.  Only a call that takes longer than that is not
    repeated: the verification has called it before.
    """
    times: list[float] = []
    while True:
        times.append(measure_next())
        recent = float(np.median(times[-10:]))
        if len(times) >= 20 and abs(recent / float(np.median(times[-20:-10])) - 1) <= 0.05:
            return recent
        if sum(times) >= limit_s and (len(times) >= 2 or times[0] > limit_s):
            return recent
        if len(times) >= MAX_WARM_UP_CALLS:
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

    admitted, refused = _verify(contestants, matches, verify_slots, tell)
    used = 0

    def measure(contestant: Contestant) -> float:
        nonlocal used
        slot = used % slots
        used += 1
        if prime and contestant.kind != "probe":
            contestant.call(slot)
        return timer.measure(contestant.call, slot)

    per_call = []
    for contestant in tuple(admitted):
        tell(f"warm up {contestant.name}", 0.0)
        seconds_per_call = _warm_up(partial(measure, contestant), plan.warmup_s)
        time.sleep(contestant.rest_s)
        reason = plan.too_slow(seconds_per_call)
        if reason and contestant.kind == "peer" and contestant is not contestants[0]:
            admitted.remove(contestant)
            refused[contestant.name] = reason
        else:
            per_call.append(seconds_per_call)

    wanted = [plan.rounds_for(seconds_per_call, len(admitted)) for seconds_per_call in per_call]
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
