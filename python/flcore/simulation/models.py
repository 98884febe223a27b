"""The small networks that `flcore train` offers; any `torch.nn.Module` can be used instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from flcore._extras import require
from flcore.errors import InvalidInputError

if TYPE_CHECKING:
    import torch

__all__ = ["MODELS", "build_model", "split_features"]

MODELS = {
    "mlp": "one hidden layer of 64 units; mlp:48,32 has layers of 48 and of 32",
    "wide": "two hidden layers of 256 units",
    "cnn": "two 3x3 convolutions (32 and 64 channels), each with 2x2 pooling, then a linear layer",
    "linear": "softmax regression",
    "mlp-bn": "the MLP with batch normalisation",
    "cnn-bn": "the CNN with batch normalisation",
    "cnn-gn": "the CNN with group normalisation, 8 channels a group",
    "mlp-projection": "the MLP with a projection head of 64 and 64 units",
    "char": "next character: embeddings of 16 values, one hidden layer of 128 units",
}
"""Name of each model and what it is."""

GROUP_CHANNELS = 8
EMBEDDING = 16


def build_model(
    name: str, example_shape: tuple[int, ...], classes: int, rng: np.random.Generator
) -> torch.nn.Module:
    """Make a network with fresh parameters.

    Parameters
    ----------
    name : str
        A key of `MODELS`, or ``"mlp:"`` and the widths of hidden layers.  On digits the MLP has
        64-64-10 units and 4,810 parameters, the wide one 85,002, the CNN 21,386.
    example_shape : tuple of int
        ``(channels, height, width)`` for the CNNs, which need at least 4 x 4; ``(window,)`` for
        ``"char"``, which takes numbers of characters below `classes`; anything for the others,
        which flatten it.
    classes : int
    rng : numpy.random.Generator
        Source of the initial parameters; they do not depend on the version of torch.

    Returns
    -------
    torch.nn.Sequential of float32 parameters, which ends in a linear layer.

    Raises
    ------
    InvalidInputError
        If there is no such model, or it does not take such examples.

    Notes
    -----
    All but those with batch normalisation, which has state, work under
    `torch.func.functional_call` and `torch.func.vmap`.  Linear and convolutional layers before a
    normalisation have no bias, which it would take away.
    """
    widths = _widths(name)
    if name not in MODELS and not widths:
        raise InvalidInputError(f"model: there is no {name!r}; choose one of: {', '.join(MODELS)}")
    nn = require("torch", extra="train").nn
    if name.startswith("cnn"):
        layers = _convolutional(nn, name, example_shape, classes)
    elif name == "char":
        layers = _characters(nn, example_shape, classes)
    else:
        layers = _flat(nn, name, math.prod(example_shape), classes, widths)
    model = nn.Sequential(*layers)
    _initialise(model, rng)
    return model


def split_features(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Give the part of a model that makes features, and the linear layer that classifies them.

    Parameters
    ----------
    model : torch.nn.Module
        With modules `features` and `head` that are applied one after the other; or an
        `nn.Sequential` whose last layer is an `nn.Linear`.

    Returns
    -------
    features, head : torch.nn.Module
        ``head(features(x))`` is ``model(x)``.  They share their parameters with `model`; those
        of an `nn.Sequential`'s features have the same names as there.

    Raises
    ------
    InvalidInputError
        If the model is neither.

    Examples
    --------
    >>> model = build_model("mlp", (1, 8, 8), 10, np.random.default_rng(0))
    >>> features, head = split_features(model)
    >>> [name for name, _ in features.named_parameters()], head.in_features
    (['1.weight', '1.bias'], 64)
    """
    nn = require("torch", extra="train").nn
    features, head = getattr(model, "features", None), getattr(model, "head", None)
    if isinstance(features, nn.Module) and isinstance(head, nn.Module):
        return features, head
    if isinstance(model, nn.Sequential) and len(model) and isinstance(model[-1], nn.Linear):
        return model[:-1], model[-1]
    raise InvalidInputError(
        "model: expected an nn.Sequential that ends in nn.Linear, or a module with modules "
        f"`features` and `head`, to tell features from classes; got {type(model).__name__}"
    )


def _widths(name: str) -> tuple[int, ...]:
    """Read the widths in mlp:48,32; nothing if there are none, or they are no widths."""
    kind, _, numbers = name.partition(":")
    widths = [text for text in numbers.split(",") if kind == "mlp"]
    if not all(text.isascii() and text.isdigit() and int(text) for text in widths):
        return ()
    return tuple(map(int, widths))


def _flat(nn: Any, name: str, inputs: int, classes: int, widths: tuple[int, ...] = ()) -> list[Any]:
    if name == "linear":
        return [nn.Flatten(), nn.Linear(inputs, classes)]
    if widths:
        sizes = [inputs, *widths]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        return [nn.Flatten(), *hidden, nn.Linear(widths[-1], classes)]
    if name == "mlp-bn":
        hidden = [nn.Linear(inputs, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
    else:
        sizes = [inputs, *((256, 256) if name == "wide" else (64,))]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    if name == "mlp-projection":
        hidden += [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)]
    return [nn.Flatten(), *hidden, nn.Linear(256 if name == "wide" else 64, classes)]


def _convolutional(nn: Any, name: str, example_shape: tuple[int, ...], classes: int) -> list[Any]:
    if len(example_shape) != 3 or min(example_shape[1:]) < 4:
        raise InvalidInputError(
            f"model: the CNN needs images of at least 4 x 4, got examples of shape "
            f"{example_shape}; use the MLP"
        )
    norms: dict[str, Callable[[int], list[Any]]] = {
        "cnn": lambda channels: [],
        "cnn-bn": lambda channels: [nn.BatchNorm2d(channels)],
        "cnn-gn": lambda channels: [nn.GroupNorm(channels // GROUP_CHANNELS, channels)],
    }
    channels, height, width = example_shape
    layers = []
    for before, after in ((channels, 32), (32, 64)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=name == "cnn"),
            *norms[name](after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return [*layers, nn.Flatten(), nn.Linear(64 * (height // 4) * (width // 4), classes)]


def _characters(nn: Any, example_shape: tuple[int, ...], classes: int) -> list[Any]:
    from flcore.simulation.layers import Numbers

    if len(example_shape) != 1:
        raise InvalidInputError(
            "model: char needs examples of shape (window,), the numbers of successive "
            f"characters, got {example_shape}"
        )
    return [
        Numbers(),
        nn.Embedding(classes, EMBEDDING),
        nn.Flatten(),
        nn.Linear(example_shape[0] * EMBEDDING, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    ]


def _initialise(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Draw He weights, N(0, 2 / inputs), but N(0, 1 / inputs) in the last layer; zero biases.

    Embeddings are drawn from N(0, 1); normalisations keep 1 and 0.
    """
    torch = require("torch", extra="train")
    weighted: list[Any] = [layer for layer in model.children() if hasattr(layer, "weight")]
    layers = [layer for layer in weighted if layer.weight.ndim > 1]
    with torch.no_grad():
        for layer in layers:
            shape = tuple(layer.weight.shape)
            gain = 1.0 if layer is layers[-1] else 2.0
            scale = math.sqrt(gain / math.prod(shape[1:]))
            if isinstance(layer, torch.nn.Embedding):
                scale = 1.0
            draw = (rng.standard_normal(shape) * scale).astype(np.float32)
            layer.weight.copy_(torch.from_numpy(draw))
            if getattr(layer, "bias", None) is not None:
                layer.bias.zero_()
