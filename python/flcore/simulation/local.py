"""Training and evaluating a torch model whose parameters come and go as NumPy arrays.

A small network spends its time in the calls, not in the arithmetic, so the loop is kept bare: all
parameters live in one vector, all gradients in another, and a step is a few calls on the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flcore._extras import require
from flcore.algorithms.base import Parameters, StepSpec, local_steps, named_views
from flcore.errors import InvalidInputError
from flcore.ops.perp_grad import pair_views, perp_grad_views

if TYPE_CHECKING:
    import torch

__all__ = ["LocalTrainer"]

EVALUATION_BATCH = 256
"""Examples in one forward pass of the evaluation; larger ones leave the cache with the CNN."""


class LocalTrainer:
    """One torch model, used in turn for every client and for the evaluation.

    Parameters
    ----------
    model : torch.nn.Module
        Maps a batch of examples to class scores.  Its parameters are moved into one vector and
        overwritten by every call; `initial` keeps what they were.
    loss, optimizer : str
        See `flcore.simulation.Settings`.

    Raises
    ------
    InvalidInputError
        If a parameter is not float32 on the CPU, or the model keeps running statistics, which
        no algorithm here exchanges.
    """

    def __init__(
        self, model: torch.nn.Module, *, loss: str = "softmax", optimizer: str = "sgd"
    ) -> None:
        self._torch = require("torch", extra="train")
        self._loss = _cross_entropy(loss)
        self._model = model
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        _check_model(model, parameters)
        sizes = [p.numel() for p in parameters.values()]
        self._x = self._torch.zeros(sum(sizes))
        self._g = self._torch.zeros(sum(sizes))
        self._shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        pieces = zip(parameters.values(), self._x.split(sizes), self._g.split(sizes), strict=True)
        for parameter, values, gradient in pieces:
            values.copy_(parameter.detach().reshape(-1))
            parameter.data = values.view(parameter.shape)
            parameter.grad = gradient.view(parameter.shape)
        self.initial: Parameters = self._named(self._x.numpy().copy())
        self._project = self._projection() if optimizer == "perpgrad" else None

    @property
    def numel(self) -> int:
        """Number of trained parameters."""
        return self._x.numel()

    def train(
        self,
        start: Parameters,
        x: torch.Tensor,
        y: torch.Tensor,
        spec: StepSpec,
        *,
        epochs: int,
        batch_size: int,
        rng: np.random.Generator,
    ) -> tuple[Parameters, float]:
        """Train on one client's examples, starting from `start`.

        Parameters
        ----------
        start : dict of float32 arrays
        x, y : tensors of n examples and their labels
        spec : StepSpec
        epochs, batch_size : int
            ``epochs * ceil(n / batch_size)`` steps, in an order drawn anew for each epoch.
        rng : numpy.random.Generator
            Source of the order, and of the seed for random layers such as dropout.

        Returns
        -------
        update : dict of float32 arrays
            Trained parameters minus `start`.
        loss : float
            Mean of the batches' losses; not finite if training diverged.
        """
        self._load(start)
        before = self._x.clone()
        self._model.train()
        self._torch.manual_seed(int(rng.integers(2**63)))
        losses: list[torch.Tensor] = []
        batches = self._gradients(x, y, epochs, batch_size, rng, losses)
        steps = local_steps(self._x, batches, replace(spec, project=self._project))
        update = (self._x - before).numpy()
        loss = float(self._torch.stack(losses).sum()) / steps
        return self._named(update), loss if np.isfinite(update).all() else math.nan

    def evaluate(
        self, parameters: Parameters, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[float, float]:
        """Give accuracy (0 to 1) and mean loss on the examples `x`, `y`."""
        torch = self._torch
        self._load(parameters)
        self._model.eval()
        correct, loss = 0, 0.0
        with torch.inference_mode():
            for first in range(0, len(y), EVALUATION_BATCH):
                batch = slice(first, first + EVALUATION_BATCH)
                scores = self._model(x[batch])
                correct += int((scores.argmax(1) == y[batch]).sum())
                loss += float(self._loss(scores, y[batch], reduction="sum"))
        return correct / len(y), loss / len(y)

    def _gradients(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        epochs: int,
        batch_size: int,
        rng: np.random.Generator,
        losses: list[torch.Tensor],
    ) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Yield one gradient function for each mini-batch, noting the losses on the way."""
        for _ in range(epochs):
            order = self._torch.from_numpy(rng.permutation(len(y)))
            x_epoch, y_epoch = x[order], y[order]
            for first in range(0, len(y), batch_size):
                x_batch = x_epoch[first : first + batch_size]
                y_batch = y_epoch[first : first + batch_size]

                def gradient(
                    _: torch.Tensor, x: torch.Tensor = x_batch, y: torch.Tensor = y_batch
                ) -> torch.Tensor:
                    self._g.zero_()
                    loss = self._loss(self._model(x), y)
                    loss.backward()
                    losses.append(loss.detach())
                    return self._g

                yield gradient

    def _projection(self) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """Return a function that projects the gradients, each along its parameter, in place.

        Parameters and gradients stay where they are, so that kernels know them once for all.
        """
        pieces = [
            (name, *(vector[first : first + size] for vector in (self._x, self._g)))
            for name, first, size in self._places()
            if size > 1
        ]
        names, weights, grads = zip(*pieces, strict=True) if pieces else ((), (), ())
        pairs = pair_views(weights, grads, [(name, f"{name}.grad") for name in names])
        return lambda x, g: perp_grad_views(pairs)

    def _places(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, first position and number of elements of each parameter."""
        first = 0
        for name, shape in self._shapes.items():
            size = math.prod(shape)
            yield name, first, size
            first += size

    def _load(self, parameters: Parameters) -> None:
        values = self._named(self._x.numpy())
        for name, value in parameters.items():
            values[name][...] = value

    def _named(self, vector: np.ndarray) -> Parameters:
        """Views of one vector, one for each parameter."""
        return named_views(vector, self._shapes)


def _cross_entropy(loss: str) -> Callable[..., Any]:
    if loss == "softmax":
        return require("torch.nn.functional", extra="train").cross_entropy
    from flcore.losses import stablemax_cross_entropy

    return stablemax_cross_entropy


def _check_model(model: torch.nn.Module, parameters: dict[str, torch.nn.Parameter]) -> None:
    if not parameters:
        raise InvalidInputError("model: it has no trainable parameter")
    for name, p in parameters.items():
        if str(p.dtype) != "torch.float32" or p.device.type != "cpu":
            raise InvalidInputError(
                f"model: parameter {name} must be float32 on the CPU, got {p.dtype} on {p.device}"
            )
    statistics = [name for name, _ in model.named_buffers() if name.endswith("running_mean")]
    if statistics:
        raise InvalidInputError(
            f"model: {statistics[0]} is a running statistic, which is not exchanged between "
            "clients and server; use GroupNorm or LayerNorm in place of BatchNorm"
        )
