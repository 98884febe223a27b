"""Losses for skewed label counts: the prior of a client's classes is taken out in the softmax.

One formula serves all: x'_k = x_k + d_k, then cross-entropy; at inference the logits stay plain.
The offsets are added as the kernel reads the logits, so they cost no traffic. Counts never leave
the client. A count of 0 masks the class: probability 0 and gradient exactly 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flcore.errors import DTypeError, InvalidInputError
from flcore.losses._row_cross_entropy import row_cross_entropy
from flcore.ops.rowloss import RowLossForm

__all__ = [
    "adjust_logits",
    "balanced_softmax_cross_entropy",
    "balanced_stablemax_cross_entropy",
    "calibrated_cross_entropy",
    "logit_adjusted_cross_entropy",
    "restricted_softmax_cross_entropy",
]


def balanced_softmax_cross_entropy(
    input: Tensor,
    target: Tensor,
    counts: Any,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of ``x_k + ln n_k`` (balanced softmax).

    Parameters
    ----------
    input : (N, C), (N, C, ...) or (C,) Tensor
        Logits.
    target : Tensor of integers
        Labels, of the shape of `input` without the classes.
    counts : (C,) numbers
        Examples of each class where the loss is computed, or any multiple of them. Classes with
        count 0 are masked, and label smoothing spreads over the others alone.
    ignore_index, reduction, label_smoothing
        As in `torch.nn.functional.cross_entropy`.

    Returns
    -------
    Tensor
        Of no dimension, or of the shape of `target` with ``reduction="none"``.

    Raises
    ------
    LabelError
        On a CPU: a label that is no class, or whose class has count 0 (its loss is infinite).
    InvalidInputError, DTypeError
        Shapes, types or counts that do not fit.

    References
    ----------
    Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020.

    Examples
    --------
    >>> import torch
    >>> from flcore.losses import balanced_softmax_cross_entropy
    >>> balanced_softmax_cross_entropy(
    ...     torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([2]), [90, 9, 1]
    ... )
    tensor(5.7435)
    """
    return _offset(input, target, _counts(counts).log(), ignore_index, reduction, label_smoothing)


def logit_adjusted_cross_entropy(
    input: Tensor,
    target: Tensor,
    prior: Any,
    *,
    tau: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of ``x_k + tau ln pi_k`` (logit adjustment, the loss form).

    Parameters
    ----------
    input, target, ignore_index, reduction, label_smoothing
        As in `balanced_softmax_cross_entropy`.
    prior : (C,) numbers
        Shares or counts of the classes.
    tau : float
        Strength; 1 is balanced softmax, 0 plain cross-entropy, which masks nothing.

    Returns
    -------
    Tensor

    Raises
    ------
    LabelError, InvalidInputError, DTypeError
        As `balanced_softmax_cross_entropy`.

    References
    ----------
    Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, arXiv 2007.07314.
    """
    offsets = _logit_offsets(prior, tau)
    return _offset(input, target, offsets, ignore_index, reduction, label_smoothing)


def adjust_logits(logits: Tensor, prior: Any, *, tau: float = 1.0, class_dim: int = -1) -> Tensor:
    """``x_k - tau ln pi_k``: logit adjustment after training, for plain argmax (Menon et al.).

    Parameters
    ----------
    logits : Tensor
        Scores of a model that was trained with plain cross-entropy.
    prior : (C,) numbers
        Shares or counts of the classes in training, all positive.
    tau : float
        Strength.
    class_dim : int
        Dimension of the classes.

    Returns
    -------
    Tensor of the shape and dtype of `logits`.

    Raises
    ------
    InvalidInputError
        A prior that is 0 or of another length.
    """
    offsets = _logit_offsets(prior, tau)
    if not torch.isfinite(offsets).all():
        raise InvalidInputError(
            "prior: expected positive numbers; a class without examples has no finite adjustment"
        )
    if len(offsets) != logits.shape[class_dim]:
        raise InvalidInputError(
            f"prior: expected {logits.shape[class_dim]} numbers, one a class, got {len(offsets)}"
        )
    moved = logits.movedim(class_dim, -1) - offsets.to(logits.device, logits.dtype)
    return moved.movedim(-1, class_dim)


def calibrated_cross_entropy(
    input: Tensor,
    target: Tensor,
    counts: Any,
    *,
    tau: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of ``x_k - tau n_k^(-1/4)`` (FedLC): rare classes need a larger margin.

    Parameters
    ----------
    input, target, ignore_index, reduction, label_smoothing
        As in `balanced_softmax_cross_entropy`.
    counts : (C,) numbers
        Examples of each class on this client; a class with 0 is masked.
    tau : float
        Strength.

    Returns
    -------
    Tensor

    Raises
    ------
    LabelError, InvalidInputError, DTypeError
        As `balanced_softmax_cross_entropy`.

    References
    ----------
    Zhang et al., "Federated Learning with Label Distribution Skew via Logits Calibration", ICML
    2022, arXiv 2209.00189; the exponent as it is commonly quoted.
    """
    n = _counts(counts)
    # also for tau = 0 the class of no example stays masked: 0 * inf has no value
    offsets = torch.where(n > 0, -float(tau) * n.clamp(min=1e-300).pow(-0.25), -torch.inf)
    return _offset(input, target, offsets, ignore_index, reduction, label_smoothing)


def restricted_softmax_cross_entropy(
    input: Tensor,
    target: Tensor,
    counts: Any,
    *,
    alpha: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy with the logits of absent classes times `alpha` (FedRS).

    The gradient of those logits is scaled alike, so that a client changes the classifier of
    classes it has never seen by less.

    Parameters
    ----------
    input, target, ignore_index, reduction, label_smoothing
        As in `balanced_softmax_cross_entropy`.
    counts : (C,) numbers
        Examples of each class on this client; only whether they are 0 counts.
    alpha : float
        Factor of the logits of absent classes, in [0, 1].

    Returns
    -------
    Tensor

    Raises
    ------
    LabelError, InvalidInputError, DTypeError
        Labels that are no class; an `alpha` outside [0, 1]; counts that do not fit.

    Notes
    -----
    Makes one scaled copy of the logits.

    References
    ----------
    Li and Zhan, "FedRS: Federated Learning with Restricted Softmax for Label Distribution
    Non-IID Data", KDD 2021.
    """
    if not 0 <= alpha <= 1:
        raise InvalidInputError(f"alpha: expected a number in [0, 1], got {alpha!r}")
    n = _counts(counts)
    dim = 1 if input.ndim > 1 else 0
    if len(n) != input.shape[dim]:
        raise InvalidInputError(f"counts: expected {input.shape[dim]} numbers, got {len(n)}")
    factors = torch.where(n > 0, 1.0, float(alpha)).to(input.device, input.dtype)
    scaled = input * factors.reshape([-1 if d == dim else 1 for d in range(input.ndim)])
    form = RowLossForm("softmax", ignore_index, label_smoothing)
    return row_cross_entropy(scaled, target, form, reduction=reduction)  # type: ignore[no-any-return]


def balanced_stablemax_cross_entropy(
    input: Tensor,
    target: Tensor,
    counts: Any,
    *,
    tau: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """StableMax cross-entropy with the prior ``n_k^tau``: ``p_k ~ n_k^tau s(x_k)``.

    The prior multiplies s. Adding its logarithm to the logits before s would be another function.

    Parameters
    ----------
    input, target, counts, ignore_index, reduction, label_smoothing
        As in `balanced_softmax_cross_entropy`.
    tau : float
        Strength; 0 is plain StableMax, which masks nothing.

    Returns
    -------
    Tensor

    Raises
    ------
    LabelError, InvalidInputError, DTypeError
        As `balanced_softmax_cross_entropy`.
    """
    form = RowLossForm("stablemax", ignore_index, label_smoothing)
    return row_cross_entropy(  # type: ignore[no-any-return]
        input, target, form, log_prior=_logit_offsets(counts, tau), reduction=reduction
    )


def _offset(
    input: Tensor,
    target: Tensor,
    offsets: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    form = RowLossForm("softmax", ignore_index, label_smoothing)
    return row_cross_entropy(  # type: ignore[no-any-return]
        input, target, form, log_prior=offsets, reduction=reduction
    )


def _counts(counts: Any, name: str = "counts") -> Tensor:
    """Vector of float64 on the CPU, where it is cheap to check; the engine moves what it needs."""
    try:
        n = torch.as_tensor(counts).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise DTypeError(f"{name}: expected numbers, got {type(counts).__name__}") from None
    if n.ndim != 1 or not len(n):
        raise InvalidInputError(f"{name}: expected one number a class, got shape {tuple(n.shape)}")
    if not bool((torch.isfinite(n) & (n >= 0)).all()) or not bool(n.sum() > 0):
        raise InvalidInputError(f"{name}: expected numbers >= 0 that are not all 0")
    return n


def _logit_offsets(prior: Any, tau: float) -> Tensor:
    n = _counts(prior, "prior")
    if tau == 0:
        return torch.zeros_like(n)
    return float(tau) * (n / n.sum()).log()
