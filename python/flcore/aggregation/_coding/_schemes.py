"""Gradient coding round by round (GC), with selective repetition (SR-SGC), multiplexed (M-SGC)."""

from __future__ import annotations

import math

import numpy as np

from flcore.aggregation._checks import whole
from flcore.aggregation._coding._schedule import JobSchedule
from flcore.aggregation._coding._stragglers import BurstyWindow
from flcore.errors import InvalidInputError

__all__ = ["GCSchedule", "MSGCSchedule", "SRSGCSchedule"]


class GCSchedule(JobSchedule):
    """One gradient code in every round, GC(n, s): job t is decoded in round t.

    Tolerates any s stragglers in a round. ``s = 0`` is the uncoded sum.

    Parameters
    ----------
    n, s : int
        ``0 <= s < n``.
    jobs : int
        Number of jobs.

    Examples
    --------
    >>> schedule = GCSchedule(4, 1, jobs=2)
    >>> schedule.load, schedule.tolerates([2]), schedule.tolerates([1, 2]), schedule.finish([2])
    (0.5, True, False, (0,))

    References
    ----------
    Tandon, Lei, Dimakis, Karampatziakis, "Gradient Coding: Avoiding Stragglers in Distributed
    Learning", ICML 2017, arXiv 1612.03301.
    """

    def __init__(self, n: int, s: int = 0, *, jobs: int) -> None:
        n = whole("n", n, 1)
        s = whole("s", s, 0, n - 1)
        super().__init__(
            n,
            jobs,
            delay=0,
            stragglers=s,
            chunks=0,
            groups=1,
            slots=1,
            load=(s + 1) / n,
            rule="model",
        )

    def _assign(self) -> list[tuple[int, np.ndarray]]:
        return [(job, np.zeros(self.n, np.int64)) for job in self._returned]

    def _in_model(self, late: np.ndarray) -> bool:
        return int(late.sum()) <= self.stragglers

    _saves_all = _in_model


class SRSGCSchedule(JobSchedule):
    r"""Selective-repeat sequential gradient coding, SR-SGC(n, B, W, lambda).

    Every worker does its GC(n, s) task of job t in round t, ``s = ceil(B lambda / (W - 1 + B))``.
    If more than s workers returned no result of job t - B in round t - B, the first of them, as
    many as are missing, repeat that task instead.

    Tolerates the (B, W, lambda)-bursty model, see `is_bursty`, and besides any round with at most
    s stragglers in which nothing is repeated.

    Parameters
    ----------
    n : int
        Workers.
    burst, window, lam : int
        B, W and lambda; B must divide W - 1.
    jobs : int
        Number of jobs.
    rule : {"model", "decodable"}
        What `tolerates` goes by.

    Examples
    --------
    >>> schedule = SRSGCSchedule(20, 2, 3, 4, jobs=40)
    >>> schedule.stragglers, schedule.load, schedule.delay
    (2, 0.15, 2)

    References
    ----------
    Krishnan, Ebrahimi, Khisti, "Sequential Gradient Coding For Straggler Mitigation", ICLR 2023,
    arXiv 2211.13802, section 3.2.
    """

    def __init__(
        self, n: int, burst: int, window: int, lam: int, *, jobs: int, rule: str = "model"
    ) -> None:
        self._past = BurstyWindow(n, burst, window, lam)
        self.burst, self.window, self.lam = self._past.burst, self._past.window, self._past.lam
        n, spread = self._past.n, self.window - 1 + self.burst
        if (self.window - 1) % self.burst:
            raise InvalidInputError(
                f"window: expected a multiple of burst = {burst}, plus 1; got {window}"
            )
        s = math.ceil(self.burst * self.lam / spread)
        if s >= n:
            raise InvalidInputError(f"lam: expected less than all of n = {n} workers, got {lam}")
        self._repeats = np.zeros(n, bool)
        super().__init__(
            n,
            jobs,
            delay=self.burst,
            stragglers=s,
            chunks=0,
            groups=1,
            slots=1,
            load=(s + 1) / n,
            rule=rule,
        )

    def _assign(self) -> list[tuple[int, np.ndarray]]:
        self._repeats = np.zeros(self.n, bool)
        plan = []
        old = self.round - self.burst
        if old in self._returned:
            missing = np.flatnonzero(~self._returned[old][:, 0])
            self._repeats[missing[: missing.size - self.stragglers]] = True
            plan.append((old, np.where(self._repeats, 0, -1)))
        if self.round in self._returned:
            plan.append((self.round, np.where(self._repeats, -1, 0)))
        return plan

    def _in_model(self, late: np.ndarray) -> bool:
        return self._exempt(late) or self._past.allows(late)

    def _saves_all(self, late: np.ndarray) -> bool:
        # Whatever is missing of this round's job can be repeated B rounds on; a repeat cannot.
        return not (late & self._repeats).any()

    def _push(self, late: np.ndarray) -> None:
        self._past.push(np.zeros(self.n, bool) if self._exempt(late) else late)

    def _exempt(self, late: np.ndarray) -> bool:
        return not self._repeats.any() and int(late.sum()) <= self.stragglers


class MSGCSchedule(JobSchedule):
    r"""Multiplexed sequential gradient coding, M-SGC(n, B, W, lambda).

    A worker does W - 1 + B mini-tasks a round, slot q for job t - q. Of each job it has W - 1
    chunks of its own, uncoded, and a share of B groups coded with GC(n, lambda). Slots 0 .. W - 2
    try its chunks for the first time; slot W - 1 + l redoes a chunk that is still missing, or else
    sends the result of group l. Loads are

    .. math::
        \frac{(\lambda + 1)(W - 1 + B)}{n (B + (W - 1)(\lambda + 1))} ,
        \qquad \lambda = n: \; \frac{W - 1 + B}{n (W - 1)} \text{ with no coded group.}

    Tolerates the (B, W, lambda)-bursty model, see `is_bursty`. A worker sends up to W - 1 + B
    results a round, because they belong to different jobs.

    Parameters
    ----------
    n : int
        Workers.
    burst, window, lam : int
        B, W > B, and lambda.
    jobs : int
        Number of jobs.
    rule : {"model", "decodable"}
        What `tolerates` goes by.

    Examples
    --------
    >>> schedule = MSGCSchedule(4, 1, 2, 2, jobs=40)
    >>> schedule.load, schedule.delay, schedule.slots
    (0.375, 1, 2)

    References
    ----------
    Krishnan, Ebrahimi, Khisti, "Sequential Gradient Coding For Straggler Mitigation", ICLR 2023,
    arXiv 2211.13802, section 3.3.
    """

    def __init__(
        self, n: int, burst: int, window: int, lam: int, *, jobs: int, rule: str = "model"
    ) -> None:
        self._past = BurstyWindow(n, burst, window, lam)
        self.burst, self.window, self.lam = self._past.burst, self._past.window, self._past.lam
        n, own, slots = self._past.n, self.window - 1, self.window - 1 + self.burst
        if self.lam == n:
            load = slots / (n * own)
        else:
            load = (self.lam + 1) * slots / (n * (self.burst + own * (self.lam + 1)))
        super().__init__(
            n,
            jobs,
            delay=slots - 1,
            stragglers=self.lam,
            chunks=own,
            groups=0 if self.lam == n else self.burst,
            slots=slots,
            load=load,
            rule=rule,
        )

    def _assign(self) -> list[tuple[int, np.ndarray]]:
        plan = []
        for job, returned in self._returned.items():
            slot = self.round - job
            if slot < self.chunks:
                columns = np.full(self.n, slot)
            else:
                own = returned[:, : self.chunks]
                coded = slot if self.groups else -1
                columns = np.where(own.all(axis=1), coded, np.argmin(own, axis=1))
            plan.append((job, columns))
        return plan

    def _in_model(self, late: np.ndarray) -> bool:
        return self._past.allows(late)

    def _saves_all(self, late: np.ndarray) -> bool:
        for job, columns in self._plan:
            slot = self.round - job
            own = self._returned[job][:, : self.chunks].sum(axis=1)
            own += ~late & (columns >= 0) & (columns < self.chunks)
            missing = min(slot + 1, self.chunks) - own
            # Rounds left in which a missing chunk can be redone; the first of them cost the
            # worker its results of as many coded groups.
            left = min(self.slots - 1 - slot, self.burst)
            if missing.max() > left:
                return False
            if self.groups:
                sent = int((~late & (columns == slot)).sum())
                if slot >= self.chunks and sent < self.n - self.lam:
                    return False
                if left and int((missing > 0).sum()) > self.lam:
                    return False
        return True

    def _push(self, late: np.ndarray) -> None:
        self._past.push(late)
