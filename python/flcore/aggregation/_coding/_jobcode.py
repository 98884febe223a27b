"""The arithmetic of a schedule: which data a task touches, its message, and a job's gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flcore.aggregation._checks import whole
from flcore.aggregation._coding._codes import GradientCode, gradient_code
from flcore.aggregation._coding._schedule import JobSchedule, Task
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops.combine import combine

__all__ = ["JobCode"]


class JobCode:
    """Messages of the tasks of a schedule, and the gradient of a job from them.

    The data of every job is cut into parts: first, for each worker, the chunks that it alone holds;
    then, for each coded group, n parts that a gradient code spreads over the workers.

    Parameters
    ----------
    schedule : JobSchedule
        Gives n, the numbers of chunks and groups, and how many stragglers a group must tolerate.
    code : GradientCode, optional
        For the coded groups; by default ``gradient_code(n, stragglers)``.

    Attributes
    ----------
    sizes : (parts,) float64
        Share of the data in each part, sum 1: all mini-tasks then cost the same.
    code : GradientCode or None
        None where nothing is coded.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import JobCode, MSGCSchedule
    >>> schedule = MSGCSchedule(4, 1, 2, 1, jobs=5)
    >>> code = JobCode(schedule)
    >>> code.sizes
    array([0.16666667, 0.16666667, 0.16666667, 0.16666667, 0.08333333, 0.08333333,
           0.08333333, 0.08333333])
    >>> g = np.arange(8.0).reshape(8, 1)  # gradients of the parts of job 0
    >>> messages = {}
    >>> for late in ([2], []):
    ...     for worker in set(range(4)) - set(late):
    ...         for task in schedule.tasks(worker):
    ...             if task.job == 0:
    ...                 parts = code.parts(worker, task)
    ...                 messages[worker, task] = code.encode(worker, task, [g[j] for j in parts])
    ...     done = schedule.finish(late)
    >>> done, code.decode(messages)
    ((0,), array([28.]))
    """

    def __init__(self, schedule: JobSchedule, code: GradientCode | None = None) -> None:
        n, s = schedule.n, schedule.stragglers
        self.n, self.chunks, self.groups = n, schedule.chunks, schedule.groups
        if code is None and self.groups:
            code = gradient_code(n, s)
        if code is not None and (not self.groups or (code.n, code.s) != (n, s)):
            want = f"a code for n = {n} and s = {s}" if self.groups else "None"
            raise InvalidInputError(
                f"code: expected {want}, got one for n = {code.n} and s = {code.s}"
            )
        self.code = code
        # A coded task touches s + 1 parts, so a chunk is as large as s + 1 of them.
        weight = np.concatenate(
            [
                np.full(self.chunks * n, code.s + 1 if code is not None else 1),
                np.ones(self.groups * n),
            ]
        )
        self.sizes = weight / weight.sum()

    def parts(self, worker: int, task: Task) -> tuple[int, ...]:
        """Give the parts of the data that a task of a worker touches, in the order of `encode`."""
        worker = whole("worker", worker, 0, self.n - 1)
        if task.kind == "chunk":
            index = whole("task.index", task.index, 0, self.chunks - 1)
            return (worker * self.chunks + index,)
        first = self.n * (self.chunks + whole("task.index", task.index, 0, self.groups - 1))
        assert self.code is not None
        return tuple(first + j for j in self.code.parts(worker))

    def encode(self, worker: int, task: Task, gradients: Sequence[Any]) -> Any:
        """Give the message of a task: the gradient of a chunk, or a combination.

        Parameters
        ----------
        worker : int
        task : Task
        gradients : updates
            Sums of the gradients over the parts that `parts` lists, in that order.

        Returns
        -------
        update

        Raises
        ------
        InvalidInputError, DTypeError, NonFiniteError
            See `flcore.ops.combine`; also another number of gradients.
        """
        self.parts(worker, task)  # checks both
        if task.kind == "chunk" or self.code is None:
            return combine(gradients, [1.0])
        return self.code.encode(worker, gradients)

    def decode(self, messages: Mapping[tuple[int, Task], Any]) -> Any:
        """Give the gradient of one job: the sum over all its parts.

        Parameters
        ----------
        messages : dict (worker, Task) -> update
            All of one job. A task that was done twice is one entry, so no result counts twice;
            results beyond what is needed are allowed.

        Returns
        -------
        update
            Summed in float64, in the dtypes of a message.

        Raises
        ------
        InvalidInputError
            Tasks of several jobs, or too few to decode.
        DTypeError, NonFiniteError
            See `flcore.ops.combine`.

        Warns
        -----
        RuntimeWarning
            See `GradientCode.decode`.
        """
        if not isinstance(messages, Mapping):
            raise DTypeError(f"messages: expected a dict, got {type(messages).__name__}")
        jobs = sorted({task.job for _, task in messages})
        if len(jobs) != 1:
            raise InvalidInputError(f"messages: expected tasks of one job, got jobs {jobs}")
        job, chosen, weights = jobs[0], [], []
        for worker in range(self.n):
            for index in range(self.chunks):
                key = (worker, Task(job, "chunk", index))
                if key not in messages:
                    raise InvalidInputError(
                        f"messages: chunk {index} of worker {worker} of job {job} is missing"
                    )
                chosen.append(messages[key])
                weights.append(1.0)
        for group in range(self.groups):
            assert self.code is not None
            task = Task(job, "coded", group)
            survivors = [worker for worker in range(self.n) if (worker, task) in messages]
            a = self.code.decode_coefficients(survivors)
            used = [messages[worker, task] for worker in survivors]
            self.code.warn_if_coarse(used, survivors)
            chosen += used
            weights += a[survivors].tolist()
        return combine(chosen, weights, accumulate="float64")
