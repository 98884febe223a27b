"""Modules of the StableMax family and of the softmax cross-entropy that keeps its digits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flcore.nn import functional

__all__ = ["CrossEntropyLoss", "LogStableMax", "StableMax", "StableMaxCrossEntropyLoss"]


class _CrossEntropy(torch.nn.Module):
    """What both losses share: options as attributes, class tensors as buffers."""

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        class_dim: int | None,
        logit_scale: float,
        z_loss: float,
        out_dtype: torch.dtype | None,
        inplace_backward: bool,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.class_dim = label_smoothing, class_dim
        self.logit_scale, self.z_loss = logit_scale, z_loss
        self.out_dtype, self.inplace_backward = out_dtype, inplace_backward

    def _options(self) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "class_dim": self.class_dim,
            "logit_scale": self.logit_scale,
            "z_loss": self.z_loss,
            "out_dtype": self.out_dtype,
            "inplace_backward": self.inplace_backward,
        }

    def extra_repr(self) -> str:
        """Options, for ``print(module)``."""
        return f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class StableMaxCrossEntropyLoss(_CrossEntropy):
    """`flcore.losses.stablemax_cross_entropy` as a module, a drop-in for `nn.CrossEntropyLoss`.

    Parameters
    ----------
    weight, ignore_index, reduction, label_smoothing, class_dim, prior, logit_scale, z_loss
        As in `flcore.losses.stablemax_cross_entropy`; `weight` and `prior` become buffers.
    out_dtype, inplace_backward
        As in `flcore.losses.stablemax_cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from flcore.nn import StableMaxCrossEntropyLoss
    >>> StableMaxCrossEntropyLoss()(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(1.3863)
    """

    prior: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        class_dim: int | None = None,
        prior: Tensor | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        out_dtype: torch.dtype | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            class_dim,
            logit_scale,
            z_loss,
            out_dtype,
            inplace_backward,
        )
        self.register_buffer("prior", prior)

    def forward(self, input: Tensor, target: Tensor, valid_mask: Tensor | None = None) -> Any:
        """Loss of logits `input` for labels or probabilities `target`."""
        return functional.stablemax_cross_entropy(
            input, target, prior=self.prior, valid_mask=valid_mask, **self._options()
        )


class CrossEntropyLoss(_CrossEntropy):
    """`flcore.losses.cross_entropy` as a module, a drop-in for `torch.nn.CrossEntropyLoss`.

    Parameters
    ----------
    weight, ignore_index, reduction, label_smoothing, class_dim, log_prior, logit_scale, z_loss
        As in `flcore.losses.cross_entropy`; `weight` and `log_prior` become buffers.
    out_dtype, inplace_backward
        As in `flcore.losses.cross_entropy`.
    """

    log_prior: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        class_dim: int | None = None,
        log_prior: Tensor | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        out_dtype: torch.dtype | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            class_dim,
            logit_scale,
            z_loss,
            out_dtype,
            inplace_backward,
        )
        self.register_buffer("log_prior", log_prior)

    def forward(self, input: Tensor, target: Tensor, valid_mask: Tensor | None = None) -> Any:
        """Loss of logits `input` for labels or probabilities `target`."""
        return functional.cross_entropy(
            input, target, log_prior=self.log_prior, valid_mask=valid_mask, **self._options()
        )


class StableMax(torch.nn.Module):
    """StableMax probabilities along a dimension: ``s(x_k) / sum_j s(x_j)``.

    Parameters
    ----------
    dim : int
        Dimension whose entries sum to 1.

    Examples
    --------
    >>> import torch
    >>> from flcore.nn import StableMax
    >>> StableMax()(torch.tensor([2.0, 0.0, -1.0, -3.0]))
    tensor([0.6316, 0.2105, 0.1053, 0.0526])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Any:
        """Probabilities of the shape of `input`."""
        return functional.stablemax(input, dim=self.dim)

    def extra_repr(self) -> str:
        """Options, for ``print(module)``."""
        return f"dim={self.dim}"


class LogStableMax(StableMax):
    """Logarithm of StableMax along a dimension: ``sign(x_k) log1p(|x_k|) - ln sum_j s(x_j)``.

    Parameters
    ----------
    dim : int
        Dimension whose probabilities sum to 1.
    """

    def forward(self, input: Tensor) -> Any:
        """Logarithms of the probabilities, of the shape of `input`."""
        return functional.log_stablemax(input, dim=self.dim)
