"""The Triton variant of the row losses: tensors on the memory of NumPy arrays, if need be."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from flcore.ops._rowloss_call import RowCall
from flcore.pykernels import rowloss as kernels

__all__ = ["rowloss"]


def rowloss(call: RowCall, mode: int) -> None:
    """Run one call; see `flcore.ops._rowloss_call.RowCall`."""
    if isinstance(call.x, np.ndarray):
        fields = {f.name: _tensor(getattr(call, f.name)) for f in dataclasses.fields(call)}
        call = dataclasses.replace(call, **fields)
    kernels.rowloss(call, mode)


def _tensor(x: Any) -> Any:
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)
