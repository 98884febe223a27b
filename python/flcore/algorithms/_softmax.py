"""Softmax regression in NumPy: the smallest model that an algorithm can train by itself."""

from __future__ import annotations

import numpy as np

__all__ = ["SoftmaxRegression"]


class SoftmaxRegression:
    """Softmax regression on the examples of one client.

    A model is a vector of ``(p + 1) * classes`` numbers, the last `classes` of them biases.

    Parameters
    ----------
    x : (n, ...) array
        Examples, which are flattened to p numbers.
    y : (n,) integers
    classes : int
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, classes: int) -> None:
        flat = np.asarray(x, np.float64).reshape(len(y), -1)
        self.x = np.concatenate([flat, np.ones((len(y), 1))], axis=1)
        self.y, self.classes = np.asarray(y), classes
        self.size = self.x.shape[1] * classes

    def losses(self, model: np.ndarray) -> np.ndarray:
        """Cross-entropy of every example, (n,)."""
        return -self._logs(model)[np.arange(len(self.y)), self.y]

    def gradient(self, model: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Gradient of ``sum weights * losses``, (d,); by default of their mean."""
        n = len(self.y)
        share = np.full(n, 1 / n) if weights is None else weights
        residual = np.exp(self._logs(model))
        residual[np.arange(n), self.y] -= 1
        return (self.x.T @ (residual * share[:, None])).ravel()

    def _logs(self, model: np.ndarray) -> np.ndarray:
        scores = self.x @ model.reshape(-1, self.classes)
        scores -= scores.max(1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(1, keepdims=True))
