"""Tensors of a row loss of a linear layer and what is expected of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flcore.errors import DTypeError, InvalidInputError

__all__ = ["Inputs", "check"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Inputs(NamedTuple):
    """Tensors of a call in the order of every signature."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Any = None
    weight: Any = None
    log_prior: Any = None
    valid_mask: Any = None


def check(inputs: Inputs, mixed: bool) -> None:
    """Check types, devices and shapes of the matrices; `mixed`: their types may differ.

    Raises
    ------
    InvalidInputError, DTypeError
        One does not fit; it is named.
    """
    for name in ("input", "linear_weight", "target", "linear_bias"):
        value = getattr(inputs, name)
        if value is None and name == "linear_bias":
            continue
        if not isinstance(value, Tensor):
            raise DTypeError(f"{name}: expected a torch tensor, got {type(value).__name__}")
        if value.device != inputs.input.device:
            raise DTypeError(
                f"{name}: expected a tensor on {inputs.input.device} like input, "
                f"got one on {value.device}"
            )
        if name != "target" and value.dtype not in FLOATS:
            raise DTypeError(f"{name}: expected one of {FLOATS}, got {value.dtype}")
        if name.startswith("linear") and not mixed and value.dtype != inputs.input.dtype:
            raise DTypeError(f"{name}: expected {inputs.input.dtype} like input, got {value.dtype}")
    hidden, matrix, bias = inputs.input, inputs.linear_weight, inputs.linear_bias
    if hidden.ndim < 1:
        raise InvalidInputError("input: expected at least one dimension, got none")
    if matrix.ndim != 2 or matrix.shape[1] != hidden.shape[-1]:
        raise InvalidInputError(
            f"linear_weight: expected shape (classes, {hidden.shape[-1]}), "
            f"got {tuple(matrix.shape)}"
        )
    if not len(matrix):
        raise InvalidInputError("linear_weight: expected at least one class, got none")
    if bias is not None and bias.shape != matrix.shape[:1]:
        raise InvalidInputError(
            f"linear_bias: expected shape {tuple(matrix.shape[:1])}, got {tuple(bias.shape)}"
        )
