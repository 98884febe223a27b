"""Gradient inversion: data with which a client's update is made again; imports torch when called.

This is an attack on the privacy of updates, used here as a tool of the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flcore._extras import require
from flcore.algorithms.layout import Vector

__all__ = ["LocalTraining", "Recovered", "invert"]

TARGETS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class LocalTraining:
    """K steps of full-batch SGD, as a client takes them, differentiable in its data.

    Parameters
    ----------
    forward : callable
        ``forward(x, parameters)`` gives class scores, and can be differentiated twice.
    steps : int
        K.
    lr, decay, momentum, clip
        Of the steps, see `flcore.algorithms.StepSpec`.
    targets : {"softmax", "sigmoid"}
        Loss of the steps against soft labels, which are given as logits: cross-entropy with their
        softmax; or binary cross-entropy with the raw values, as in the authors' code.
    """

    forward: Any
    steps: int
    lr: float
    decay: float = 0.0
    momentum: float = 0.0
    clip: float | None = None
    targets: str = "softmax"

    def update(self, start: Any, x: Any, labels: Any) -> Any:
        """Give the change of the parameters, (d,) tensor.

        Parameters
        ----------
        start : (d,) tensor
        x : (n, ...) tensor
        labels : (n, classes) tensor
            Logits.
        """
        torch = require("torch", extra="train")
        graph = x.requires_grad or labels.requires_grad
        w = start if start.requires_grad else start.clone().requires_grad_()
        first, buffer = w, None
        for _ in range(self.steps):
            (g,) = torch.autograd.grad(self._loss(w, x, labels), w, create_graph=graph)
            if self.clip is not None:
                g = g * (self.clip / g.norm().clamp_min(self.clip))
            g = g + self.decay * w
            if self.momentum:
                buffer = g if buffer is None else self.momentum * buffer + g
                g = buffer
            w = w - self.lr * g
            if not graph:
                w = w.detach().requires_grad_()
        return w - first.detach()

    def _loss(self, w: Any, x: Any, labels: Any) -> Any:
        functional = require("torch.nn.functional", extra="train")
        scores = self.forward(x, w)
        if self.targets == "sigmoid":
            return functional.binary_cross_entropy_with_logits(scores, labels)
        return functional.cross_entropy(scores, labels.softmax(1))


@dataclass
class Recovered:
    """What an inversion found.

    Parameters
    ----------
    x : (n, ...) float32 array
    labels : (n, classes) float32 array
        Logits.
    distance : float
        The objective at the end.
    """

    x: np.ndarray
    labels: np.ndarray
    distance: float

    def update(self, training: LocalTraining, start: Vector) -> Vector:
        """Give what a client with these data would send after training from `start`."""
        torch = require("torch", extra="train")
        w, x, labels = (torch.from_numpy(v).double() for v in (start, self.x, self.labels))
        return training.update(w, x, labels).detach().numpy().astype(start.dtype)


def invert(
    training: LocalTraining,
    start: Vector,
    update: Vector,
    first: Recovered,
    *,
    iterations: int,
    lr: float = 1.0,
    kept: float = 1.0,
    box: tuple[float, float] | None = None,
) -> Recovered:
    """Look for data whose local training changes `start` by `update`.

    Minimises ``|| mask * (training.update(start, x, labels) - update) ||_1`` in float64 by Adam,
    with the sign of the gradient in x, x clamped to `box`, and a tenth of the learning rate after
    3/8, 5/8 and 7/8 of the iterations.

    Parameters
    ----------
    training : LocalTraining
    start, update : (d,) arrays
    first : Recovered
        Where the search starts.
    iterations : int
    lr : float
    kept : float
        Part of the coordinates, those where `update` is largest, that the mask lets through.
    box : (low, high) or None
        Range of the inputs.
    """
    torch = require("torch", extra="train")
    w, u = (torch.from_numpy(np.array(v)).double() for v in (start, update))
    chosen = u.abs().topk(max(1, round(kept * len(u)))).indices
    x, labels = (torch.from_numpy(v).double().requires_grad_() for v in (first.x, first.labels))
    optimizer = torch.optim.Adam([x, labels], lr)
    cuts = [iterations * eighths // 8 for eighths in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, cuts)

    def objective() -> Any:
        return (training.update(w, x, labels) - u)[chosen].abs().sum()

    for _ in range(iterations):
        optimizer.zero_grad()
        objective().backward()
        x.grad.sign_()
        optimizer.step()
        schedule.step()
        if box is not None:
            with torch.no_grad():
                x.clamp_(*box)
    distance = float(objective().detach())
    x_found, labels_found = (v.detach().numpy().astype(np.float32) for v in (x, labels))
    return Recovered(x_found, labels_found, distance)
