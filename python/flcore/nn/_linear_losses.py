"""Modules of a classifier and its cross-entropy in one: logits are never formed as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flcore.losses import linear_cross_entropy, stablemax_linear_cross_entropy

__all__ = ["LinearCrossEntropyLoss", "StableMaxLinearCrossEntropyLoss"]


class _LinearLoss(torch.nn.Module):
    """The classifier, options as attributes, class tensors as buffers."""

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        out_dtype: torch.dtype | None = None,
        chunk_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)
        self.register_buffer("weight", weight)
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing, self.logit_scale, self.z_loss = label_smoothing, logit_scale, z_loss
        self.out_dtype, self.chunk_rows = out_dtype, chunk_rows

    def _options(self) -> dict[str, Any]:
        return {
            "linear_bias": self.linear.bias,
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "logit_scale": self.logit_scale,
            "z_loss": self.z_loss,
            "out_dtype": self.out_dtype,
            "chunk_rows": self.chunk_rows,
        }

    def extra_repr(self) -> str:
        """Options, for ``print(module)``."""
        return f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class StableMaxLinearCrossEntropyLoss(_LinearLoss):
    """`flcore.losses.stablemax_linear_cross_entropy` with its classifier, ``self.linear``.

    Parameters
    ----------
    in_features, num_classes : int
        Width of a hidden state; number of classes.
    bias : bool
        Give the classifier a bias.
    device, dtype
        Where the classifier is, and its type.
    prior : (num_classes,) Tensor, optional
        Factors of the element map, a buffer.
    reduction, weight, ignore_index, label_smoothing, logit_scale, z_loss, out_dtype, chunk_rows
        As in `flcore.losses.stablemax_linear_cross_entropy`; `weight` becomes a buffer.

    Examples
    --------
    >>> import torch
    >>> from flcore.nn import StableMaxLinearCrossEntropyLoss
    >>> loss = StableMaxLinearCrossEntropyLoss(16, 100)
    >>> value = loss(torch.zeros(3, 16), torch.tensor([0, 5, 99]))
    >>> round(value.item(), 6)
    4.60517
    """

    prior: Tensor | None

    def __init__(
        self, in_features: int, num_classes: int, *, prior: Tensor | None = None, **options: Any
    ) -> None:
        super().__init__(in_features, num_classes, **options)
        self.register_buffer("prior", prior)

    def forward(self, input: Tensor, target: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """Loss of hidden states `input` for labels or probabilities `target`."""
        return stablemax_linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            valid_mask=valid_mask,
            prior=self.prior,
            **self._options(),
        )


class LinearCrossEntropyLoss(_LinearLoss):
    """`flcore.losses.linear_cross_entropy` with its classifier, as `nn.LinearCrossEntropyLoss`.

    Parameters
    ----------
    in_features, num_classes, bias, device, dtype, reduction, weight, ignore_index, label_smoothing
        As in `StableMaxLinearCrossEntropyLoss`.
    logit_scale, z_loss, out_dtype, chunk_rows
        As in `StableMaxLinearCrossEntropyLoss`.
    log_prior : (num_classes,) Tensor, optional
        Added to the logits, a buffer.
    """

    log_prior: Tensor | None

    def __init__(
        self, in_features: int, num_classes: int, *, log_prior: Tensor | None = None, **options: Any
    ) -> None:
        super().__init__(in_features, num_classes, **options)
        self.register_buffer("log_prior", log_prior)

    def forward(self, input: Tensor, target: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """Loss of hidden states `input` for labels or probabilities `target`."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            valid_mask=valid_mask,
            log_prior=self.log_prior,
            **self._options(),
        )
