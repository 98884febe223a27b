"""State that belongs to training examples: which row of a batch writes, and checked numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from flcore.errors import DTypeError, InvalidInputError

__all__ = ["checked_index", "last_rows"]


def checked_index(index: Tensor, examples: int) -> Tensor:
    """Numbers of the examples of a batch as int64; on a CPU their range is checked.

    Raises
    ------
    DTypeError, InvalidInputError
        No integers, or a number that is no example.
    """
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise DTypeError(f"index: expected a tensor of integers, got {got}")
    if index.device.type == "cpu" and len(index):
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= examples:
            raise InvalidInputError(
                f"index: expected numbers from 0 to {examples - 1}, got {low} to {high}"
            )
    return index.long()


def last_rows(index: Tensor) -> Tensor:
    """Row of the last occurrence of each row's example, (N,): writing it is free of races."""
    unique, group = torch.unique(index, return_inverse=True)
    rows = torch.arange(len(index), device=index.device)
    last = torch.zeros_like(unique).scatter_reduce(0, group, rows, "amax", include_self=False)
    return last[group]
