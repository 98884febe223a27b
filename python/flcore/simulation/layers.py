"""Layers that the models need beyond those of torch; imports torch."""

from __future__ import annotations

import torch

from flcore.simulation.models import split_features

__all__ = ["FrozenFeatures", "Numbers"]


class FrozenFeatures(torch.nn.Module):
    """A model of which the last layer alone is trained, and which takes features as well.

    Parameters
    ----------
    model : torch.nn.Module
        See `flcore.simulation.models.split_features`; shares its parameters, of which all but
        those of the last layer need no gradient from now on.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.features, self.head = split_features(model)
        self.features.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenFeatures:
        """Leave the features in evaluation mode."""
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give class scores of examples (n, ...), or of features (n, p)."""
        given = x.shape[1:] == (self.head.in_features,)
        return self.head(x if given else self.features(x))


class Numbers(torch.nn.Module):
    """Turn whole numbers that come as float32, such as characters, into int64 for an embedding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give `x` as int64."""
        return x.long()
