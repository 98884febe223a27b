"""What an algorithm can ask of a model without knowing which it is."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from flcore._extras import require
from flcore.algorithms.layout import Layout, Vector

__all__ = ["BatchLoss", "Forward", "ModelTools", "mean_cross_entropy"]


class Forward(Protocol):
    """The model of a client inside its loss."""

    def __call__(
        self, x: Any, parameters: Any = None, *, features: bool = False, **options: Any
    ) -> Any:
        """Give class scores of a batch.

        Parameters
        ----------
        x : (n, ...) tensor
        parameters : (d,) tensor, optional
            Run a frozen model with these, in evaluation mode; None: the model that is trained.
        features : bool
            Give ``(features, scores)``, the first being what the last layer gets.
        **options
            For the model, which gets them as they are.
        """


class BatchLoss(Protocol):
    """The loss of a mini-batch, in the place of the mean cross-entropy."""

    def __call__(self, forward: Forward, x: Any, y: Any, weight: Any, aux: dict[str, Any]) -> Any:
        """Give a scalar tensor.

        Parameters
        ----------
        forward : Forward
        x, y : tensors
            n examples and their labels.
        weight : (n,) tensor
            Share of each example in the mean; they add up to 1, and are 0 for padding.
        aux : dict
            `flcore.algorithms.LocalWork.aux`, arrays as tensors; and the number of the local step
            as an int, "step".
        """


class ModelTools(Protocol):
    """Model and data of one client, or of the server."""

    layout: Layout
    example_shape: tuple[int, ...]

    @property
    def x(self) -> Any:
        """The examples, (n, ...) float32."""

    @property
    def y(self) -> Any:
        """Their labels, (n,) int64."""

    @property
    def classes(self) -> int:
        """Number of classes."""

    def losses(self, model: Vector, x: Any = None, y: Any = None) -> np.ndarray:
        """Cross-entropy of every example under `model` in evaluation mode, (n,) float32."""

    def features(self, model: Vector, x: Any = None) -> np.ndarray:
        """What the last layer gets, of every example, (n, features) float32."""

    def scores(self, model: Vector, x: Any = None) -> np.ndarray:
        """Class scores of every example, (n, classes) float32."""

    def gradient(self, model: Vector, x: Any = None, y: Any = None) -> np.ndarray:
        """Gradient of the mean cross-entropy under `model`, (d,) float32, 0 for statistics."""


def mean_cross_entropy(scores: Any, y: Any, weight: Any) -> Any:
    """Give the cross-entropy of class scores (n, C), the examples weighted as `BatchLoss` says."""
    cross_entropy = require("torch.nn.functional", extra="train").cross_entropy
    return (cross_entropy(scores, y, reduction="none") * weight).sum()
