"""The local steps of some clients, from their starts to their ends, on rows of one matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flcore.algorithms.state import LocalResult
from flcore.algorithms.step import local_steps
from flcore.errors import InvalidInputError
from flcore.ops.perp_grad import pair_views, perp_grad_views
from flcore.simulation._gradients import Plan
from flcore.simulation._inputs import Extra, Kind
from flcore.simulation._minibatches import blocks
from flcore.simulation._trace import UntraceableError

if TYPE_CHECKING:
    from flcore.simulation.batched import BatchedTrainer
    from flcore.simulation.local import Job

__all__ = ["Together"]


class Together:
    """One call's training of clients whose steps are alike.

    Parameters
    ----------
    trainer : BatchedTrainer
    jobs : list of Job
        Who has most steps comes first.
    """

    def __init__(self, trainer: BatchedTrainer, jobs: Sequence[Job]) -> None:
        self._trainer, self._jobs = trainer, jobs
        self._gradients = gradients = trainer.gradients
        gradients.reserve(len(jobs))
        self._rows = gradients.x[: len(jobs)]
        starts = np.stack([job.work.start for job in jobs])
        self._rows.copy_(torch.from_numpy(starts))
        self._x, x_offsets = self._data("x")
        self._y, y_offsets = self._data("y")
        self._orders = [self._order(offsets) for offsets in (x_offsets, y_offsets)]
        self._extra = self._inputs()
        self._blocks = blocks([job.view for job in jobs])
        self._steps: list[Any] = []
        self._first = self._next = 0
        self._plans: list[Plan] = []
        self._start = self._rows.data_ptr()
        self._found: dict[int, torch.Tensor] = {}

    def run(self) -> list[LocalResult]:
        """Take all steps."""
        steps = [len(job.view.sizes) for job in self._jobs]
        specs = [job.work.spec for job in self._jobs]
        if self._trainer.optimizer == "perpgrad":
            project = _projection(self._gradients, self._trainer.layout.slices.values())
            specs = [replace(spec, project=project) for spec in specs]
        self._trainer.one.model.train()
        local_steps(self._rows, self._gradient, specs, steps)
        losses = self._losses() / np.array(steps)
        ends = self._rows.to("cpu", copy=True).numpy()
        finite = np.isfinite(ends).all(1)
        return [
            LocalResult(job.work, end, count, float(loss) if ok else math.nan)
            for job, end, count, loss, ok in zip(
                self._jobs, ends, steps, losses, finite, strict=True
            )
        ]

    def _gradient(self, rows: torch.Tensor, k: int) -> torch.Tensor:
        """Give the gradients of the k-th mini-batches; the same memory in every call."""
        again = k < self._next
        if not again:
            self._load(k)
        gradients, plan, n = self._gradients, self._plans[-1], rows.shape[0]
        shifted = rows.data_ptr() != self._start
        if shifted:
            gradients.shifted[:n].copy_(rows)
        plan.run(shifted)
        if not again:
            plan.note_losses()
        if n not in self._found:
            self._found[n] = gradients.g[:n]
        return self._found[n]

    def _load(self, k: int) -> None:
        """Take the mini-batches of step k, which follows that of the last call."""
        if k == self._first + len(self._steps):
            self._open()
        index, labels, weights = self._steps[k - self._first]
        if not self._plans or self._gradients.has_own_loss or k == self._first:
            plan = self._gradients.plan(self._clients, self._kind, self._extra, k)
            if not self._plans or self._plans[-1] is not plan:
                self._plans.append(plan)
        self._plans[-1].load(self._x, index, labels, weights)
        self._next = k + 1

    def _open(self) -> None:
        """Take the next steps whose mini-batches have the same size."""
        block = next(self._blocks)
        _, self._clients, size = block.index.shape
        device = self._trainer.device
        self._first = block.first
        self._kind = Kind.of(size, self._x, self._y)
        index, places = (
            torch.from_numpy(order[block.index]).flatten(1).to(device) for order in self._orders
        )
        labels = self._y.index_select(0, places.flatten()).view(*places.shape, *self._y.shape[1:])
        classes = self._gradients.classes(self._kind)
        if classes:
            least, largest = (int(value) for value in labels.aminmax())
            if least < 0 or largest >= classes:
                raise InvalidInputError(
                    f"y: expected labels from 0 to {classes - 1}, as the model gives {classes} "
                    f"scores, got {least if least < 0 else largest}"
                )
        weights = torch.from_numpy(np.ascontiguousarray(block.weight)).flatten(1).to(device)
        self._steps = list(zip(index.unbind(), labels.unbind(), weights.unbind(), strict=True))

    def _losses(self) -> np.ndarray:
        total = np.zeros(len(self._jobs))
        for plan in {id(plan): plan for plan in self._plans}.values():
            losses = plan.take_losses().double().cpu().numpy()
            total[: len(losses)] += losses
        return total

    def _data(self, name: str) -> tuple[torch.Tensor, list[int]]:
        """Give the examples or labels of all clients, and where those of each begin."""
        given = [getattr(job.view, name) for job in self._jobs]
        offsets, parts, places, total = [], [], {}, 0
        for array in given:
            if array is None:
                array = self._trainer.data(name)
            if id(array) not in places:
                places[id(array)] = total
                parts.append(torch.as_tensor(array).to(self._trainer.device))
                total += len(array)
            offsets.append(places[id(array)])
        return (parts[0] if len(parts) == 1 else torch.cat(parts)), offsets

    def _order(self, offsets: list[int]) -> np.ndarray:
        """Give the places of all clients' examples, in the order of their mini-batches."""
        orders = [job.view.order for job in self._jobs]
        order = np.concatenate(orders)
        if any(offsets):
            order = order + np.repeat(offsets, [len(part) for part in orders])
        return order

    def _inputs(self) -> Extra:
        """Put the further inputs of the losses where they were in earlier rounds."""
        extra, jobs = Extra(), self._jobs
        for name, first in sorted(jobs[0].work.aux.items()):
            values = [job.work.aux[name] for job in jobs]
            if not isinstance(first, (np.ndarray, torch.Tensor)):
                if not isinstance(first, (bool, int, float, str, np.generic, type(None))):
                    raise UntraceableError(f"aux[{name!r}] is of type {type(first).__name__}")
                extra.plain[name] = first
            elif len(jobs) > 1 and all(value is first for value in values):
                extra.shared[name] = self._place(name, torch.as_tensor(first), None)
            else:
                stacked = torch.stack([torch.as_tensor(value) for value in values])
                extra.stacked[name] = self._place(name, stacked, len(self._gradients.x))
        return extra

    def _place(self, name: str, value: torch.Tensor, rows: int | None) -> torch.Tensor:
        shape = value.shape if rows is None else (rows, *value.shape[1:])
        key = name, tuple(shape), value.dtype
        memory = self._trainer.aux
        if key not in memory:
            memory[key] = torch.zeros(shape, dtype=value.dtype, device=self._trainer.device)
        memory[key][: len(value)] = value
        return memory[key]


def _projection(gradients: Any, slices: Any) -> Callable[[Any, Any], None]:
    """Return a function that projects gradients, each along its parameter, in place."""
    pieces = [piece for piece in slices if piece.stop - piece.start > 1]
    known: dict[Any, Any] = {}

    def project(x: torch.Tensor, g: torch.Tensor) -> None:
        key = x.data_ptr(), g.data_ptr(), len(x)
        if key not in known:
            places = [(i, piece) for i in range(len(x)) for piece in pieces]
            weights, grads = ([rows[i, piece] for i, piece in places] for rows in (x, g))
            names = [(f"x[{i}]", f"g[{i}]") for i, _ in places]
            known[key] = pair_views(weights, grads, names)
        perp_grad_views(known[key])

    return project
