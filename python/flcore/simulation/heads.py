"""Changes to the last layer of a network."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import numpy as np

from flcore._extras import require
from flcore.errors import InvalidInputError
from flcore.simulation.models import split_features

if TYPE_CHECKING:
    import torch

__all__ = ["widen_head"]


def widen_head(model: torch.nn.Module, outputs: int, *, seed: int = 0) -> torch.nn.Module:
    """Give a copy of a network with more outputs.

    Parameters
    ----------
    model : torch.nn.Module
        As `split_features` takes it, its last layer an `nn.Linear`.
    outputs : int
        Not fewer than there are.
    seed : int
        Of the new rows, drawn from N(0, 1 / features); their biases are 0.

    Returns
    -------
    torch.nn.Module
        Whose first outputs are those of `model`.

    Raises
    ------
    InvalidInputError
        If the last layer is no `nn.Linear`, or has more outputs.
    """
    torch = require("torch", extra="train")
    model = copy.deepcopy(model)
    _, head = split_features(model)
    if not isinstance(head, torch.nn.Linear) or head.out_features > outputs:
        raise InvalidInputError(
            f"model: expected a last layer nn.Linear with at most {outputs} outputs, got {head}"
        )
    wider = torch.nn.Linear(head.in_features, outputs, bias=head.bias is not None)
    scale = 1 / math.sqrt(head.in_features)
    drawn = np.random.default_rng(seed).standard_normal((outputs, head.in_features)) * scale
    with torch.no_grad():
        wider.weight.copy_(torch.from_numpy(drawn))
        wider.weight[: head.out_features] = head.weight
        if head.bias is not None:
            wider.bias.zero_()
            wider.bias[: head.out_features] = head.bias
    if isinstance(model, torch.nn.Sequential) and model[-1] is head:
        model[-1] = wider
    else:
        model.head = wider
    return model
