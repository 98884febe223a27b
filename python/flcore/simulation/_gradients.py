"""Gradients of many copies of a model, each on its own mini-batch, as one computation.

The computation is recorded once and replayed in every step; see `flcore.simulation._trace`. Where
the loss is the plain cross-entropy, the kernel of `flcore.ops.row_loss` gives it, with its
gradient, in one visit to the scores.
"""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.func import vmap

from flcore import _variants
from flcore.algorithms.tools import BatchLoss
from flcore.ops import _rowloss_prepare as prepare
from flcore.ops._rowloss_call import RowCall
from flcore.ops._rowloss_cpu import prepared
from flcore.ops.rowloss import BOTH, RowLossForm
from flcore.simulation._functional import FunctionalModel, MeanLoss
from flcore.simulation._inputs import Extra, Kind
from flcore.simulation._replay import Call, Replay
from flcore.simulation._trace import Trace, UntraceableError, record

__all__ = ["Gradients", "Plan"]

MEMORY, KEPT = 512 << 20, 512
"""Most bytes and most computations that are kept."""


class Gradients:
    """Losses of clients and their gradients.

    Parameters
    ----------
    network : FunctionalModel
    loss : {"softmax", "stablemax"}
    function : callable
        The same, as `torch.nn.functional.cross_entropy` is called.
    batch_loss : BatchLoss, optional
        What is minimised in the place of its mean.
    device : torch.device
    stepwise : bool
        Record losses that read the number of the step once for each step; False: refuse them.

    Attributes
    ----------
    x, shifted, g : (clients, d) tensors
        Parameters, parameters beside them, and gradients; see `reserve`.
    """

    def __init__(
        self,
        network: FunctionalModel,
        loss: str,
        function: Callable[..., torch.Tensor],
        batch_loss: BatchLoss | None,
        device: Any,
        stepwise: bool = True,
    ) -> None:
        self.network, self.device, self.stepwise = network, device, stepwise
        self.form = RowLossForm(loss)
        self.has_own_loss = batch_loss is not None
        self.batch_loss = MeanLoss(function) if batch_loss is None else batch_loss
        self._traces: dict[Any, Trace] = {}
        self._classes: dict[Kind, int] = {}
        self._stepwise: set[Any] = set()
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self.x = self.shifted = self.g = torch.empty(0)
        self.reserve(1)

    def reserve(self, clients: int) -> None:
        """Make room for so many clients."""
        if len(self.x) < clients:
            self._plans.clear()
            shape = clients, sum(self.network.sizes)
            self.x, self.shifted, self.g = (
                torch.zeros(shape, device=self.device) for _ in range(3)
            )

    def plan(self, clients: int, kind: Kind, extra: Extra, step: int) -> Plan:
        """Give the computation for the first so many clients.

        Parameters
        ----------
        clients : int
        kind : Kind
        extra : Extra
            Its tensors are read where they are.
        step : int
            Number of the local step.

        Raises
        ------
        UntraceableError
        """
        key = self._trace(kind, extra, step)
        places = tuple(tensor.data_ptr() for tensor in extra.tensors(clients))
        name = (*key, clients, places)
        if name not in self._plans:
            self._plans[name] = Plan(
                self, self._traces[key], clients, kind, extra, self.classes(kind)
            )
            while len(self._plans) > KEPT or (
                len(self._plans) > 1 and sum(p.nbytes for p in self._plans.values()) > MEMORY
            ):
                self._plans.popitem(last=False)
        self._plans.move_to_end(name)
        return self._plans[name]

    def _trace(self, kind: Kind, extra: Extra, step: int) -> Any:
        """Record what is computed, unless that is done; gives its key."""
        key: tuple[Any, ...] = kind, extra.key
        if key in self._stepwise:
            key = (*key, step)
        if key in self._traces:
            return key
        with torch.inference_mode(False), torch.enable_grad():
            if self.classes(kind):
                self._traces[key] = record(self._scores, lambda n: self._scores_arguments(n, kind))
                return key
            loss = _Loss(self, extra, step)
            trace = record(loss, lambda n: loss.arguments(n, kind))
        if loss.step_read and not self.stepwise:
            raise UntraceableError("they depend on the number of the step")
        if loss.step_read and len(key) == 2:
            self._stepwise.add(key)
            key = (*key, step)
        self._traces[key] = trace
        if len(self._traces) > KEPT:
            del self._traces[next(iter(self._traces))]
        return key

    def classes(self, kind: Kind) -> int:
        """Give the scores of an example, if the kernel of the row losses serves; else 0.

        It needs one row of scores and one label for each example.
        """
        if self.has_own_loss or kind.y[0] or kind.y[1] != torch.int64:
            return 0
        if kind not in self._classes:
            x = kind.zeros(1, self.device)[0][0]
            with torch.no_grad():
                shape = self.network(self.network.single(self.x[0]), x).shape
            self._classes[kind] = shape[1] if len(shape) == 2 and shape[0] == kind.size else 0
        return self._classes[kind]

    def _scores_arguments(self, clients: int, kind: Kind) -> list[torch.Tensor]:
        shape = clients, kind.size, self._classes[kind]
        x, _, weight = kind.zeros(clients, self.device)
        rows = weight.new_zeros(clients, self.x.shape[1])
        return [weight.new_zeros(shape), x, *self.network.stacked(rows)]

    def _scores(
        self, upstream: torch.Tensor, x: torch.Tensor, *parameters: torch.Tensor
    ) -> list[torch.Tensor]:
        """Give scores, and gradients for given gradients of the scores."""
        leaves = _leaves(parameters)
        scores = vmap(self.network)(leaves, x)
        return [scores.detach(), *_gradients(_Backward.apply(scores, upstream), leaves)]


class _Loss:
    """A loss that is recorded, as a function of tensors."""

    def __init__(self, owner: Gradients, extra: Extra, step: int) -> None:
        self._network, self._loss, self._device = owner.network, owner.batch_loss, owner.device
        self._extra, self._step = extra, step
        self.step_read = False

    def arguments(self, clients: int, kind: Kind) -> list[torch.Tensor]:
        batch, extra = kind.zeros(clients, self._device), self._extra.zeros(clients)
        rows = batch[-1].new_zeros(clients, sum(self._network.sizes))
        return [*batch, *extra, *self._network.stacked(rows)]

    def __call__(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor
    ) -> list[torch.Tensor]:
        """Give the losses and their gradients."""
        extra = self._extra
        count = len(extra.stacked) + len(extra.shared)
        leaves = _leaves(rest[count:])
        dims = [*(0 for _ in extra.stacked), *(None for _ in extra.shared)]
        losses = vmap(self._one, (0, 0, 0, 0, *dims))(leaves, x, y, weight, *rest[:count])
        return [losses.detach(), *_gradients(losses.sum(), leaves)]

    def _one(self, parameters: Any, x: Any, y: Any, weight: Any, *tensors: Any) -> Any:
        names = (*self._extra.stacked, *self._extra.shared)
        aux = _Aux(dict(zip(names, tensors, strict=True)) | self._extra.plain)
        aux["step"] = self._step
        loss = self._loss(self._network.forward(parameters), x, y, weight, aux)  # type: ignore[arg-type]
        self.step_read |= aux.step_read
        return loss


class _Aux(UserDict[str, Any]):
    """Knows whether the number of the step was read."""

    step_read = False

    def __getitem__(self, name: str) -> Any:
        self.step_read |= name == "step"
        return super().__getitem__(name)


def _leaves(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach().requires_grad_() for parameter in parameters]


def _gradients(of: torch.Tensor, leaves: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    return torch.autograd.grad(of, leaves, allow_unused=True, materialize_grads=True)


class _Backward(torch.autograd.Function):
    """A number whose gradient in the scores is what is given.

    `torch.autograd.grad` takes such gradients, too, but then it imports sympy, half a second long.
    """

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(upstream)
        return scores.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0], None


class Plan:
    """The computation for some number of clients with mini-batches of one kind.

    Parameters
    ----------
    owner : Gradients
        Whose memory is read and written.
    trace : Trace
    clients : int
    kind : Kind
    extra : Extra
    classes : int
        Scores of an example, where the trace gives scores; 0: it gives losses.
    """

    def __init__(
        self,
        owner: Gradients,
        trace: Trace,
        clients: int,
        kind: Kind,
        extra: Extra,
        classes: int,
    ) -> None:
        self._owner, self._trace, self._clients, self._classes = owner, trace, clients, classes
        self._x, self._y, self._weight = kind.zeros(clients, owner.device)
        self._examples = self._x.flatten(0, 1)
        self._labels, self._shares = self._y.flatten(0, 1), self._weight.flatten()
        self._extra = extra.tensors(clients)
        self._values = torch.empty(0)
        self._losses = torch.zeros(clients, kind.size, device=owner.device)
        self._runs: dict[bool, tuple[list[Call], torch.Tensor]] = {}
        self.nbytes = 0

    def load(
        self, x: torch.Tensor, index: torch.Tensor, y: torch.Tensor, weight: torch.Tensor
    ) -> None:
        """Take the mini-batches of a step.

        Parameters
        ----------
        x : (n, ...) tensor
            All examples.
        index : (clients * size,) int64
        y : (clients * size, ...) tensor
        weight : (clients * size,) float32
        """
        torch.index_select(x, 0, index, out=self._examples)
        self._labels.copy_(y)
        self._shares.copy_(weight)

    def run(self, shifted: bool) -> None:
        """Put the gradients into `Gradients.g`."""
        if shifted not in self._runs:
            self._runs[shifted] = (self._with_kernel if self._classes else self._alone)(shifted)
        calls, self._values = self._runs[shifted]
        for call in calls:
            call()

    def note_losses(self) -> None:
        """Add up the losses of the last run."""
        if self._classes:
            torch.addcmul(self._losses, self._values, self._weight, out=self._losses)
        else:
            self._losses[:, 0] += self._values

    def take_losses(self) -> torch.Tensor:
        """Give the sum of the noted losses of each client, and start anew."""
        total = self._losses.sum(1)
        self._losses.zero_()
        return total

    def _replay(self, shifted: bool, *inputs: torch.Tensor, late: str | None = None) -> Replay:
        owner, n = self._owner, self._clients
        parameters = owner.network.stacked((owner.shifted if shifted else owner.x)[:n])
        into = dict(enumerate(owner.network.stacked(owner.g[:n]), 1))
        replay = Replay(self._trace, n, [*inputs, *parameters], into, late)
        self.nbytes += replay.nbytes
        return replay

    def _alone(self, shifted: bool) -> tuple[list[Call], torch.Tensor]:
        """Give the calls for losses that are part of the trace, and the losses."""
        replay = self._replay(shifted, self._x, self._y, self._weight, *self._extra)
        return replay.early + replay.late, replay.outputs[0]

    def _with_kernel(self, shifted: bool) -> tuple[list[Call], torch.Tensor]:
        """Give the calls for losses that come from the scores, and the losses."""
        upstream = self._weight.new_zeros(*self._weight.shape, self._classes)
        replay = self._replay(shifted, upstream, self._x, late=self._trace.inputs[0])
        loss = prepare.prepare(replay.outputs[0], self._y, self._owner.form, -1)
        loss.loss, loss.upstream = prepare.empty_rows(loss), self._shares
        aside = prepare.attach_gradient(loss, upstream)
        kernel: list[Call] = [_rowloss(loss)]
        if aside is not None:
            kernel.append(partial(upstream.copy_, aside))
        return [*replay.early, *kernel, *replay.late], loss.loss


def _rowloss(loss: RowCall) -> Call:
    """Give the call of the kernel for losses and gradients of rows of scores."""
    if loss.device == "cpu":
        return prepared(loss, BOTH)
    return partial(_variants.choose("rowloss", loss.device, None), loss, BOTH)
