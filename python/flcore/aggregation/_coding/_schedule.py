"""Jobs in flight: which worker computes what in which round, and which jobs can be decoded.

A job is one gradient: the sum over all data, due `delay` rounds after the round that starts it.
Workers do mini-tasks of two kinds: a "chunk" is a piece of data of their own, uncoded; a "coded"
task is their message of a gradient code. The schemes themselves are in `_schemes`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from flcore.aggregation._checks import client_mask, whole
from flcore.errors import InvalidInputError

__all__ = ["RULES", "JobSchedule", "Task"]

RULES = ("model", "decodable")


@dataclass(frozen=True, order=True)
class Task:
    """A mini-task of one worker.

    Attributes
    ----------
    job : int
    kind : {"chunk", "coded"}
    index : int
        Which of the worker's own chunks of the job, or which coded group.
    """

    job: int
    kind: str
    index: int


class JobSchedule(ABC):
    """What the schemes share: jobs in flight, and who has returned which of their tasks.

    In every round the workers do their `tasks`; the master decides whom it waits for, with the help
    of `tolerates`, and closes the round with `finish`.

    Attributes
    ----------
    n : int
        Workers.
    jobs : int
        Jobs in all; job t starts in round t, both from 0.
    delay : int
        T: job t is decoded at the end of round t + T or before.
    rounds : int
        ``jobs + delay``.
    stragglers : int
        How many results of a coded group may be missing.
    chunks, groups : int
        Chunks of its own that a worker has of each job, and coded groups of a job.
    slots : int
        Mini-tasks of a worker in a full round.
    load : float
        Share of the data of a job that a worker processes in a full round; 1 / n without coding.
    rule : str
        What `tolerates` goes by.
    round : int
        The round that runs, from 0.
    lost : list of int
        Jobs that missed their round. It stays empty while `finish` gets no more stragglers than
        `tolerates` accepted.
    """

    def __init__(
        self,
        n: int,
        jobs: int,
        *,
        delay: int,
        stragglers: int,
        chunks: int,
        groups: int,
        slots: int,
        load: float,
        rule: str,
    ) -> None:
        if rule not in RULES:
            raise InvalidInputError(f"rule: expected one of {RULES}, got {rule!r}")
        self.n, self.jobs, self.delay = n, whole("jobs", jobs, 1), delay
        self.rounds = self.jobs + delay
        self.stragglers, self.chunks, self.groups = stragglers, chunks, groups
        self.slots, self.load, self.rule = slots, load, rule
        self.round = 0
        self.lost: list[int] = []
        self._returned: dict[int, np.ndarray] = {}  # job -> (n, chunks + groups) bool
        self._start()

    @abstractmethod
    def _assign(self) -> list[tuple[int, np.ndarray]]:
        """Give pairs (job, column of each worker's task in `_returned` or -1 for none)."""

    @abstractmethod
    def _in_model(self, late: np.ndarray) -> bool:
        """Whether the straggler model of the scheme allows these workers to be late now."""

    @abstractmethod
    def _saves_all(self, late: np.ndarray) -> bool:
        """Whether every job can still be decoded if nobody is late from the next round on."""

    def _push(self, late: np.ndarray) -> None:
        """Take the round into the past of the straggler model."""
        return None

    def _start(self) -> None:
        if self.round < self.jobs:
            self._returned[self.round] = np.zeros((self.n, self.chunks + self.groups), bool)
        self._plan = self._assign()
        self._busy = np.zeros(self.n, np.int64)
        for _, columns in self._plan:
            self._busy += columns >= 0

    # ---- the round -----------------------------------------------------------------------------

    def tasks(self, worker: int) -> tuple[Task, ...]:
        """Give the tasks of one worker in this round."""
        worker = whole("worker", worker, 0, self.n - 1)
        found = []
        for job, columns in self._plan:
            column = int(columns[worker])
            if column >= self.chunks:
                found.append(Task(job, "coded", column - self.chunks))
            elif column >= 0:
                found.append(Task(job, "chunk", column))
        return tuple(found)

    def work(self) -> np.ndarray:
        """Give the share of the data that each worker processes in this round, (n,) float64."""
        return self._busy * (self.load / self.slots)

    def tolerates(self, stragglers: Any) -> bool:
        """Whether these workers' results of this round can be done without.

        Where they cannot, some of them have to be waited for; nobody late is always tolerated.

        Parameters
        ----------
        stragglers : (n,) bool mask, or indices
            Workers without a task do not count.

        Notes
        -----
        rule "model": the pattern so far stays within the straggler model that the scheme is made
        for. "decodable": every job can still be decoded if the master waits for everybody from the
        next round on, which refuses less and never more than necessary.
        """
        late = client_mask("stragglers", stragglers, self.n) & (self._busy > 0)
        if not late.any():
            return True
        return self._saves_all(late) and (self.rule == "decodable" or self._in_model(late))

    def finish(self, stragglers: Any) -> tuple[int, ...]:
        """End this round, in which everybody but the stragglers returned; plan the next one.

        Parameters
        ----------
        stragglers : (n,) bool mask, or indices

        Returns
        -------
        tuple of int
            Jobs that can be decoded now and could not before.

        Raises
        ------
        InvalidInputError
            All rounds are over, or the argument cannot be used.
        """
        if self.round >= self.rounds:
            raise InvalidInputError(f"finish: all {self.rounds} rounds are over")
        late = client_mask("stragglers", stragglers, self.n) & (self._busy > 0)
        self._push(late)
        for job, columns in self._plan:
            back = ~late & (columns >= 0)
            self._returned[job][back, columns[back]] = True
        done = tuple(job for job, returned in self._returned.items() if self._decodable(returned))
        for job in done:
            del self._returned[job]
        if self._returned.pop(self.round - self.delay, None) is not None:
            self.lost.append(self.round - self.delay)
        self.round += 1
        self._start()
        return done

    def _decodable(self, returned: np.ndarray) -> bool:
        own, coded = returned[:, : self.chunks], returned[:, self.chunks :]
        return bool(own.all() and (coded.sum(axis=0) >= self.n - self.stragglers).all())
