"""The small networks that `flcore train` offers; any `torch.nn.Module` can be used instead."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from flcore._extras import require
from flcore.errors import InvalidInputError

if TYPE_CHECKING:
    import torch

__all__ = ["MODELS", "build_model"]

MODELS = {
    "mlp": "one hidden layer of 64 units",
    "wide": "two hidden layers of 256 units",
    "cnn": "two 3x3 convolutions (32 and 64 channels), each with 2x2 pooling, then a linear layer",
}
"""Name of each model and what it is."""


def build_model(
    name: str, example_shape: tuple[int, ...], classes: int, rng: np.random.Generator
) -> torch.nn.Module:
    """Make a network with fresh parameters.

    Parameters
    ----------
    name : {"mlp", "wide", "cnn"}
        On digits the MLP has 64-64-10 units and 4,810 parameters, the wide one 85,002, the CNN
        21,386.
    example_shape : tuple of int
        ``(channels, height, width)`` for the CNN, which needs at least 4 x 4; anything for the
        others, which flatten it.
    classes : int
    rng : numpy.random.Generator
        Source of the initial parameters; they do not depend on the version of torch.

    Returns
    -------
    torch.nn.Module of float32 parameters.
    """
    if name not in MODELS:
        raise InvalidInputError(f"model: there is no {name!r}; choose one of: {', '.join(MODELS)}")
    nn = require("torch", extra="train").nn
    if name != "cnn":
        sizes = [math.prod(example_shape), *((64,) if name == "mlp" else (256, 256))]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))
    else:
        if len(example_shape) != 3 or min(example_shape[1:]) < 4:
            raise InvalidInputError(
                f"model: the CNN needs images of at least 4 x 4, got examples of shape "
                f"{example_shape}; use the MLP"
            )
        channels, height, width = example_shape
        model = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), classes),
        )
    _initialise(model, rng)
    return model


def _initialise(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Draw He weights, N(0, 2 / inputs), but N(0, 1 / inputs) in the last layer; zero biases."""
    torch = require("torch", extra="train")
    layers: list[Any] = [layer for layer in model.children() if hasattr(layer, "weight")]
    with torch.no_grad():
        for layer in layers:
            shape = tuple(layer.weight.shape)
            gain = 1.0 if layer is layers[-1] else 2.0
            scale = math.sqrt(gain / math.prod(shape[1:]))
            draw = (rng.standard_normal(shape) * scale).astype(np.float32)
            layer.weight.copy_(torch.from_numpy(draw))
            layer.bias.zero_()
