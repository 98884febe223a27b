"""What kind of module each tensor of a network belongs to, told by type and not by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flcore._extras import require
from flcore.errors import InvalidInputError
from flcore.simulation.models import split_features

if TYPE_CHECKING:
    import torch

__all__ = ["module_kinds"]


def module_kinds(model: torch.nn.Module) -> dict[str, str]:
    """Give the kinds that `flcore.algorithms.Layout` knows, for the tensors that have one.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    dict of name to kind
        "batch_norm" for parameters and statistics of batch normalisation of any dimension,
        whatever the module is called; "classifier" for those of the last layer, if the model has
        one that can be told (see `split_features`).

    Examples
    --------
    >>> import torch
    >>> module_kinds(torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 3)))
    {'0.weight': 'batch_norm', '0.bias': 'batch_norm', '0.running_mean': 'batch_norm', \
'0.running_var': 'batch_norm', '1.weight': 'classifier', '1.bias': 'classifier'}
    """
    nn = require("torch", extra="train").nn
    batch_norm = nn.modules.batchnorm._BatchNorm
    try:
        head = set(split_features(model)[1].modules())
    except InvalidInputError:
        head = set()
    kinds = {}
    for name, module in model.named_modules():
        kind = "batch_norm" if isinstance(module, batch_norm) else "classifier"
        if kind == "classifier" and module not in head:
            continue
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for tensor, value in tensors:
            if value.is_floating_point():  # the counter of batches is no part of a model's vector
                kinds[f"{name}.{tensor}" if name else tensor] = kind
    return kinds
