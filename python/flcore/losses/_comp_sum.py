"""The comp-sum family: cross-entropy, generalised cross-entropy, mean absolute error in one.

With ``u = sum_{k != y} exp(x_k - x_y) = (1 - p_y) / p_y``::

    L_tau = ((1 + u)^(1 - tau) - 1) / (1 - tau),      L_1 = log(1 + u)
    dL/dx_k = (1 + u)^(1 - tau) (p_k - [k = y])

one factor a row beside cross-entropy, from ``log1p(u)``, so that a row that is all but certain
keeps its digits. StableMax has the same family, with s in the place of exp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flcore.errors import InvalidInputError
from flcore.losses._row_cross_entropy import check_reduction, row_cross_entropy
from flcore.ops.rowloss import RowLossForm

__all__ = [
    "adversarial_inputs",
    "comp_sum_loss",
    "generalized_cross_entropy",
    "mae_loss",
    "smooth_adversarial_comp_sum_loss",
    "sum_exponential_loss",
]


def comp_sum_loss(
    input: Tensor,
    target: Tensor,
    tau: float = 1.0,
    *,
    map: str = "softmax",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    logit_scale: float = 1.0,
) -> Tensor:
    """Comp-sum loss of order `tau`.

    Parameters
    ----------
    input : (N, C), (N, C, ...) or (C,) Tensor
        Logits.
    target : Tensor of integers
        Labels.
    tau : float
        0 sum-exponential, 1 cross-entropy, between 1 and 2 generalised cross-entropy with
        ``q = tau - 1``, 2 mean absolute error.
    map : {"softmax", "stablemax"}
        Probabilities that stand behind ``p_y``.
    weight, ignore_index, reduction
        As in `torch.nn.functional.cross_entropy`.
    logit_scale : float
        Factor of the logits, the inverse of a temperature.

    Returns
    -------
    Tensor
        Of no dimension, or of the shape of `target` with ``reduction="none"``. Below tau = 1 a
        confident mistake can exceed the range of float32: its loss is then inf.

    Raises
    ------
    LabelError, InvalidInputError, DTypeError
        As `flcore.losses.cross_entropy`; a `tau` outside [0, 2].

    References
    ----------
    Mao, Mohri and Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
    ICML 2023, arXiv 2304.07288.

    Examples
    --------
    >>> import torch
    >>> from flcore.losses import comp_sum_loss
    >>> comp_sum_loss(torch.tensor([[2.0, 0.0, -1.0, -3.0]]), torch.tensor([0]), 1.5)
    tensor(0.1680)
    """
    if not 0 <= tau <= 2:
        raise InvalidInputError(f"tau: expected a number in [0, 2], got {tau!r}")
    if map not in ("softmax", "stablemax"):
        raise InvalidInputError(f"map: expected softmax or stablemax, got {map!r}")
    form = RowLossForm(map, ignore_index, logit_scale=logit_scale, tau=tau)
    return row_cross_entropy(  # type: ignore[no-any-return]
        input, target, form, weight=weight, reduction=reduction
    )


def generalized_cross_entropy(
    input: Tensor,
    target: Tensor,
    q: float = 0.7,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """``(1 - p_y^q) / q``: cross-entropy for q -> 0, mean absolute error at 1; for noisy labels.

    Parameters
    ----------
    input, target, weight, ignore_index, reduction
        As in `comp_sum_loss`.
    q : float
        In (0, 1]; larger is more robust and slower.

    Returns
    -------
    Tensor

    Raises
    ------
    InvalidInputError
        A `q` outside (0, 1]; what `comp_sum_loss` raises.

    References
    ----------
    Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with
    Noisy Labels", NeurIPS 2018, arXiv 1805.07836.
    """
    if not 0 < q <= 1:
        raise InvalidInputError(f"q: expected a number in (0, 1], got {q!r}")
    return comp_sum_loss(
        input, target, 1 + q, weight=weight, ignore_index=ignore_index, reduction=reduction
    )


def mae_loss(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Mean absolute error of the probability of the label, ``1 - p_y``: `comp_sum_loss` of 2.

    Bounded by 1 and insensitive to symmetric label noise; slow from scratch, because a row that is
    certain of another class has nearly no gradient. Arguments and errors of `comp_sum_loss`.
    """
    return comp_sum_loss(
        input, target, 2.0, weight=weight, ignore_index=ignore_index, reduction=reduction
    )


def sum_exponential_loss(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """``1 / p_y - 1 = sum_{k != y} exp(x_k - x_y)``: `comp_sum_loss` of 0.

    Arguments and errors of `comp_sum_loss`.
    """
    return comp_sum_loss(
        input, target, 0.0, weight=weight, ignore_index=ignore_index, reduction=reduction
    )


def smooth_adversarial_comp_sum_loss(
    input: Tensor,
    adversarial: Tensor,
    target: Tensor,
    tau: float = 1.0,
    *,
    rho: float = 1.0,
    nu: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Comp-sum loss plus the distance that an attack moves the margins.

    ``L_tau(h / rho) + nu ||D(x', y) - D(x, y)||_2`` with the margins ``D_k = h_y - h_k``. The
    supremum over x' is the caller's: `adversarial_inputs` approximates it.

    Parameters
    ----------
    input : (N, C) Tensor
        Scores h(x).
    adversarial : (N, C) Tensor
        Scores h(x') of the attacked examples.
    target : (N,) Tensor of integers
        Labels.
    tau : float
        Order, in [0, 2].
    rho : float
        Scale of the margins, positive.
    nu : float
        Weight of the second term, not negative.
    reduction : {"mean", "sum", "none"}
        Over the examples.

    Returns
    -------
    Tensor

    Raises
    ------
    InvalidInputError
        Shapes or numbers that do not fit.

    References
    ----------
    Mao, Mohri and Zhong, arXiv 2304.07288, smooth adversarial comp-sum losses; that the norm is
    the Euclidean one is not checked against the paper.
    """
    if input.ndim != 2 or adversarial.shape != input.shape:
        raise InvalidInputError(
            f"adversarial: expected scores (N, C) of the shape of input {tuple(input.shape)}, got "
            f"{tuple(adversarial.shape)}"
        )
    if not rho > 0 or not nu >= 0:
        raise InvalidInputError(f"expected rho > 0 and nu >= 0, got {rho!r} and {nu!r}")
    check_reduction(reduction)
    rows = comp_sum_loss(input, target, tau, logit_scale=1 / rho, reduction="none")
    label = target.long()[:, None]
    moved = _margins(adversarial, label) - _margins(input, label)
    rows = rows + nu * torch.linalg.vector_norm(moved, dim=1)
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()


def _margins(scores: Tensor, label: Tensor) -> Tensor:
    return scores.gather(1, label) - scores


def adversarial_inputs(
    scores: Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    *,
    radius: float,
    steps: int = 10,
    step_size: float | None = None,
) -> Tensor:
    """Examples within `radius` (largest coordinate) of `x` that move the margins furthest.

    Projected gradient ascent on ``||D(x', y) - D(x, y)||_2``, from a point off `x` where that
    norm has a gradient.

    Parameters
    ----------
    scores : callable
        Maps (N, ...) examples to (N, C) scores.
    x : (N, ...) Tensor
        Examples.
    target : (N,) Tensor of integers
        Labels.
    radius : float
        Largest change of a coordinate, in units of `x`.
    steps : int
        Steps of ascent, at least 1.
    step_size : float, optional
        In units of `x`; by default ``2.5 radius / steps``.

    Returns
    -------
    Tensor of the shape of `x`, detached.

    Raises
    ------
    InvalidInputError
        A radius that is negative, or no steps.

    References
    ----------
    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
    arXiv 1706.06083.
    """
    if not radius >= 0 or steps < 1:
        raise InvalidInputError(f"expected radius >= 0 and steps >= 1, got {radius!r}, {steps!r}")
    size = 2.5 * radius / steps if step_size is None else step_size
    label = target.long()[:, None]
    with torch.no_grad():
        start = _margins(scores(x), label)
    moved = x.detach() + radius * torch.empty_like(x).uniform_(-1, 1)
    for _ in range(steps):
        moved.requires_grad_()
        distance = torch.linalg.vector_norm(_margins(scores(moved), label) - start, dim=1).sum()
        (grad,) = torch.autograd.grad(distance, moved)
        moved = (moved.detach() + size * grad.sign()).clamp(x - radius, x + radius)
    return moved.detach()
