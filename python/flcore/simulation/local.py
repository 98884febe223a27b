"""Training and evaluating a torch model whose numbers come and go as one NumPy vector.

A small network spends its time in the calls, not in the arithmetic, so the loop is kept bare: all
parameters live in one vector, all gradients in another, and a step is a few calls on the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from flcore._extras import require
from flcore.algorithms.layout import Layout, Vector
from flcore.algorithms.state import DataView, LocalResult, LocalWork
from flcore.algorithms.step import local_steps
from flcore.algorithms.tools import BatchLoss
from flcore.errors import InvalidInputError
from flcore.ops.perp_grad import pair_views, perp_grad_views

if TYPE_CHECKING:
    import torch

__all__ = ["Job", "LocalTrainer", "Trainer", "choose_trainer"]

EVALUATION_BATCH = 256
"""Examples in one forward pass of the evaluation; larger ones leave the cache with the CNN."""

GATHERED = 2048
"""Examples that are put into the order of the mini-batches at a time."""


@dataclass
class Job:
    """The local training of one client in one round.

    Parameters
    ----------
    client : int
    work : LocalWork
    view : DataView
    seed : int
        For random layers such as dropout.
    """

    client: int
    work: LocalWork
    view: DataView
    seed: int


class Trainer(Protocol):
    """Trains and evaluates one kind of model."""

    layout: Layout
    initial: Vector

    def train(self, jobs: Sequence[Job]) -> list[LocalResult]:
        """Do the local training of several clients; a loss that is not finite is left to see."""

    def evaluate(self, model: Vector, x: Any, y: Any) -> tuple[float, float]:
        """Give accuracy (0 to 1) and mean loss on the examples `x`, `y`."""


class LocalTrainer:
    """One torch model, used for all clients one after another, and for the evaluation.

    Parameters
    ----------
    model : torch.nn.Module
        Maps a batch of examples to class scores.  Its parameters are moved into one vector and
        overwritten by every call; `initial` keeps what they were.
    x, y : tensors, optional
        Training data that `DataView.order` refers to.
    loss, optimizer : str
        See `flcore.simulation.Settings`.
    batch_loss : BatchLoss, optional
        What is minimised in the place of the mean loss of the batch.
    statistics : bool
        Whether an algorithm takes care of running statistics (BatchNorm); if not, a model that
        has any is refused.

    Raises
    ------
    InvalidInputError
        If a parameter is not float32 on the CPU, or the model keeps running statistics and no one
        takes care of them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        x: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        *,
        loss: str = "softmax",
        optimizer: str = "sgd",
        batch_loss: BatchLoss | None = None,
        statistics: bool = False,
    ) -> None:
        self._torch = torch = require("torch", extra="train")
        self._loss = _cross_entropy(loss)
        if batch_loss is not None and loss != "softmax":
            raise InvalidInputError(
                f'loss: this algorithm has a loss of its own, on top of softmax; got "{loss}"'
            )
        self._batch_loss = batch_loss
        self._model = model
        self.x, self.y = x, y
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        buffers = _statistics(model)
        _check_model(parameters, {} if statistics else buffers)
        trained = sum(p.numel() for p in parameters.values())
        tensors = parameters | buffers
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.layout = Layout(shapes, trained, kinds=_kinds(model, shapes))
        self._x = torch.zeros(self.layout.numel)
        self._g = torch.zeros(trained)
        for name, piece in self.layout.slices.items():
            tensor = tensors[name]
            values = self._x[piece]
            values.copy_(tensor.detach().reshape(-1))
            tensor.data = values.view(tensor.shape)
            if name in parameters:
                tensor.grad = self._g[piece].view(tensor.shape)
        self.initial: Vector = self._x.numpy().copy()
        self._project = self._projection() if optimizer == "perpgrad" else None

    @property
    def numel(self) -> int:
        """Number of trained parameters."""
        return self.layout.trained

    @property
    def model(self) -> torch.nn.Module:
        """The module, with the numbers of the last call."""
        return self._model

    def train(self, jobs: Sequence[Job]) -> list[LocalResult]:
        """Train one client after another.

        Returns
        -------
        One LocalResult a job, in order; where training diverged, its loss is NaN.
        """
        return [self._train(job) for job in jobs]

    def _train(self, job: Job) -> LocalResult:
        torch = self._torch
        start = torch.from_numpy(np.ascontiguousarray(job.work.start))
        self._x.copy_(start)
        self._model.train()
        torch.manual_seed(job.seed)
        losses: list[Any] = []
        batches = self._batches(job.view)
        batch: list[Any] = [-1, None, None]
        aux = {
            name: torch.as_tensor(value) if isinstance(value, np.ndarray) else value
            for name, value in job.work.aux.items()
        }

        def gradient(rows: Any, k: int) -> Any:
            if k != batch[0]:
                batch[:] = [k, *next(batches)]
            elsewhere = rows.data_ptr() != self._x.data_ptr()
            if elsewhere:
                here = self._x[: self.layout.trained].clone()
                self._x[: self.layout.trained].copy_(rows[0])
            self._g.zero_()
            aux["step"] = k
            loss = self._objective(batch[1], batch[2], aux)
            loss.backward()
            if elsewhere:
                self._x[: self.layout.trained].copy_(here)
            if len(losses) <= k:
                losses.append(loss.detach())
            return self._g[None]

        x = self._x[: self.layout.trained][None]
        spec = replace(job.work.spec, project=self._project)
        local_steps(x, gradient, [spec], [len(job.view.sizes)])
        end = self._x.numpy().copy()
        loss = float(torch.stack(losses).sum()) / len(losses)
        return LocalResult(job.work, end, len(losses), loss if np.isfinite(end).all() else math.nan)

    def evaluate(self, model: Vector, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
        """Give accuracy (0 to 1) and mean loss on the examples `x`, `y`."""
        correct, loss = 0, 0.0
        for scores, labels in self._passes(model, x, y):
            correct += int((scores.argmax(1) == labels).sum())
            loss += float(self._loss(scores, labels, reduction="sum"))
        return correct / len(y), loss / len(y)

    def losses(self, model: Vector, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
        """Give the loss of every example in evaluation mode, (n,) float32."""
        parts = [
            self._loss(scores, labels, reduction="none")
            for scores, labels in self._passes(model, x, y)
        ]
        return self._torch.cat(parts).numpy()

    def scores(self, model: Vector, x: torch.Tensor) -> np.ndarray:
        """Give the class scores of every example in evaluation mode, (n, classes) float32."""
        return self._torch.cat([scores for scores, _ in self._passes(model, x, x)]).numpy()

    def features(self, model: Vector, x: torch.Tensor) -> np.ndarray:
        """Give what the last layer gets, of every example, (n, features) float32."""
        from flcore.simulation.models import split_features

        body, _ = split_features(self._model)
        parts = [out for out, _ in self._passes(model, x, x, module=body)]
        return self._torch.cat(parts).numpy()

    def gradient(self, model: Vector, x: torch.Tensor, y: torch.Tensor) -> Vector:
        """Give the gradient of the mean loss over the examples, in training mode, (d,)."""
        self._x.copy_(self._torch.from_numpy(np.ascontiguousarray(model)))
        self._model.train()
        self._g.zero_()
        self._loss(self._model(x), y).backward()
        gradient = np.zeros_like(model)
        gradient[: self.layout.trained] = self._g.numpy()
        return gradient

    def _passes(
        self, model: Vector, x: torch.Tensor, y: torch.Tensor, module: Any = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Run the model on one part of the examples after another, in evaluation mode."""
        self._x.copy_(self._torch.from_numpy(np.ascontiguousarray(model)))
        self._model.eval()
        with self._torch.inference_mode():
            for first in range(0, len(x), EVALUATION_BATCH):
                batch = slice(first, first + EVALUATION_BATCH)
                yield (module or self._model)(x[batch]), y[batch]

    def _objective(self, x: torch.Tensor, y: torch.Tensor, aux: dict[str, Any]) -> torch.Tensor:
        if self._batch_loss is None:
            return self._loss(self._model(x), y)
        weight = x.new_full((len(y),), 1.0 / len(y))
        return self._batch_loss(self._forward, x, y, weight, aux)

    def functional(self, x: torch.Tensor, parameters: torch.Tensor, **options: Any) -> Any:
        """Give the scores as a function of a (d,) tensor, differentiable in it; evaluation mode."""
        self._model.eval()
        named = {
            name: parameters[piece].view(self.layout.shapes[name])
            for name, piece in self.layout.slices.items()
        }
        return self._torch.func.functional_call(self._model, named, (x,), options)

    def _forward(
        self, x: torch.Tensor, parameters: Any = None, *, features: bool = False, **options: Any
    ) -> Any:
        """`flcore.algorithms.tools.Forward` of the model that is trained."""
        if parameters is None:
            return _run(self._model, x, features, options)
        training = self._model.training
        here = self._x.clone()  # put back before the backward pass needs it
        self._model.eval()  # frozen models do not move statistics
        self._x.copy_(parameters)
        with self._torch.no_grad():
            out = _run(self._model, x, features, options)
        self._x.copy_(here)
        self._model.train(training)
        return out

    def _batches(self, view: DataView) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the mini-batches; examples are gathered many at a time."""
        x = self.x if view.x is None else self._torch.as_tensor(view.x)
        y = self.y if view.y is None else self._torch.as_tensor(view.y)
        assert x is not None and y is not None
        order = self._torch.from_numpy(view.order)
        first = 0
        ahead: list[int] = []
        for i, size in enumerate(view.sizes):
            ahead.append(size)
            if sum(ahead) < GATHERED and i + 1 < len(view.sizes):
                continue
            part = order[first : first + sum(ahead)]
            yield from zip(x[part].split(ahead), y[part].split(ahead), strict=True)
            first += sum(ahead)
            ahead = []

    def _projection(self) -> Callable[[Any, Any], None]:
        """Return a function that projects the gradients, each along its parameter, in place.

        Parameters and gradients stay where they are, so that kernels know them once for all.
        """
        pieces = [
            (name, self._x[piece], self._g[piece])
            for name, piece in self.layout.slices.items()
            if 1 < piece.stop - piece.start and piece.stop <= self.layout.trained
        ]
        names, weights, grads = zip(*pieces, strict=True) if pieces else ((), (), ())
        pairs = pair_views(weights, grads, [(name, f"{name}.grad") for name in names])
        return lambda x, g: perp_grad_views(pairs)


def choose_trainer(trainer: LocalTrainer, settings: Any, algorithm: Any) -> Any:
    """Give what trains the clients of a round: the trainer itself, or one that batches them."""
    if settings.execution == "sequential":
        return trainer
    from flcore.simulation import batched

    return batched.choose_trainer(
        trainer,
        execution=settings.execution,
        participants=settings.participants,
        loss=settings.loss,
        optimizer=settings.optimizer,
        batch_loss=algorithm.batch_loss(),
    )


def _run(model: Any, x: Any, features: bool, options: dict[str, Any]) -> Any:
    """Give the scores, or the features and the scores."""
    if not features:
        return model(x, **options)
    from flcore.simulation.models import split_features

    body, head = split_features(model)
    inner = body(x)
    return inner, head(inner)


def _cross_entropy(loss: str) -> Callable[..., Any]:
    if loss == "softmax":
        return require("torch.nn.functional", extra="train").cross_entropy
    from flcore.losses import stablemax_cross_entropy

    return stablemax_cross_entropy


def _kinds(model: torch.nn.Module, shapes: dict[str, Any]) -> dict[str, str]:
    """Give the kinds of the tensors that are in the vector."""
    from flcore.simulation.kinds import module_kinds

    return {name: kind for name, kind in module_kinds(model).items() if name in shapes}


def _statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Give the running statistics that the model keeps by itself."""
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }


def _check_model(
    parameters: dict[str, torch.nn.Parameter], statistics: dict[str, torch.Tensor]
) -> None:
    if not parameters:
        raise InvalidInputError("model: it has no trainable parameter")
    for name, p in parameters.items():
        if str(p.dtype) != "torch.float32" or p.device.type != "cpu":
            raise InvalidInputError(
                f"model: parameter {name} must be float32 on the CPU, got {p.dtype} on {p.device}"
            )
    if statistics:
        raise InvalidInputError(
            f"model: {next(iter(statistics))} is a running statistic, which this algorithm does "
            "not exchange between clients and server; use GroupNorm or LayerNorm in place of "
            "BatchNorm, or the algorithm fedbn"
        )
