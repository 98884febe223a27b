"""Label-distributionally robust losses: the worst case over class weights, for noisy labels.

With scores f normalised and margins ``z_k = f_k - f_y + c [k != y]``::

    l = max_p sum_k p_k z_k - lambda KL(p || 1/K) = lambda log( (1/K) sum_k exp(z_k / lambda) )

which is lambda times the cross-entropy of ``(f + c) / lambda``, less ``lambda log K``; its gradient
in f is ``p_k - [k = y]`` whatever lambda is. ALDR-KL finds a lambda for each example.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flcore.errors import DTypeError, InvalidInputError
from flcore.losses._examples import checked_index, last_rows
from flcore.losses._row_cross_entropy import check_reduction, row_cross_entropy
from flcore.ops.rowloss import RowLossForm

__all__ = ["ALDRLoss", "ldr_loss"]

NORMALIZATIONS = ("softplus", "l1", "none")
SMALLEST_NORM = 1e-12  # scores that are all 0 stay 0


def ldr_loss(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    margin: float = 0.1,
    normalize: str = "softplus",
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """LDR-KL loss of (N, C) scores.

    Parameters
    ----------
    input : (N, C) Tensor
        Scores of the network.
    target : (N,) Tensor of integers
        Labels.
    temperature : float
        lambda, positive: towards 0 the multi-class margin loss of Crammer and Singer, towards
        infinity the mean of the margins.
    margin : float
        c, added to every class but the label.
    normalize : {"softplus", "l1", "none"}
        softplus of the scores over their mean; scores over the mean of their magnitudes; or the
        scores as they are.
    ignore_index, reduction
        As in `torch.nn.functional.cross_entropy`.

    Returns
    -------
    Tensor
        Of no dimension, or (N,) with ``reduction="none"``. May be negative: it compares with the
        mean over the classes, not with their sum.

    Raises
    ------
    LabelError, InvalidInputError, DTypeError
        As `flcore.losses.cross_entropy`; a temperature that is not positive.

    References
    ----------
    Zhu, Ying and Yang, "Label Distributionally Robust Losses for Multi-class Classification",
    ICML 2023, arXiv 2112.14869; normalisations as in the authors' code.

    Examples
    --------
    >>> import torch
    >>> from flcore.losses import ldr_loss
    >>> scores = torch.tensor([[1.0, 0.0, -1.0]])
    >>> ldr_loss(scores, torch.tensor([0]), normalize="none", margin=0.0)
    tensor(-0.6910)
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InvalidInputError(f"temperature: expected a positive number, got {temperature!r}")
    f = _normalized(input, normalize)
    form = RowLossForm(
        "softmax", ignore_index, logit_scale=1 / temperature, margin=margin / temperature
    )
    loss = row_cross_entropy(f, target, form, reduction="none")
    keep = target != ignore_index
    loss = temperature * (loss - math.log(input.shape[1])) * keep
    return _reduced(loss, keep, reduction)


class ALDRLoss(torch.nn.Module):
    """ALDR-KL: a temperature for every training example, softer where the label looks wrong.

    Each visit of example i takes one step of the alternation in the authors' code::

        KL = KL(softmax(f / lambda_i) || 1/K),    lambda_i <- lambda0 - lambda0 KL / (alpha log K)
        l_i = lambda_i log mean exp(z / lambda_i) - alpha log K / (2 lambda0) (lambda_i - lambda0)^2

    so that ``lambda_i`` lies in ``[lambda0 (1 - 1/alpha), lambda0]``. It is constant in the
    gradient, which is exact where the alternation has converged.

    Parameters
    ----------
    examples : int
        Number of training examples; `forward` gets the numbers of those in a batch.
    temperature : float
        lambda0, positive.
    alpha : float
        Adaptivity, above 1; larger stays nearer to lambda0.
    margin : float
        c, added to every class but the label.
    normalize : {"l1", "softplus", "none"}
        As in `ldr_loss`.
    reduction : {"mean", "sum", "none"}
        Over the batch.

    Attributes
    ----------
    temperatures : (examples,) float32 Tensor
        lambda_i; a buffer, so it is in the state_dict and moves with the module. It belongs to the
        data: in federated training keep it with the client, from round to round.

    Raises
    ------
    InvalidInputError
        Numbers out of range.

    References
    ----------
    Zhu, Ying and Yang, ICML 2023, arXiv 2112.14869. The scale of the regulariser is that of the
    code, which may differ from the paper's.
    """

    temperatures: Tensor

    def __init__(
        self,
        examples: int,
        *,
        temperature: float = 1.0,
        alpha: float = 2.0,
        margin: float = 0.1,
        normalize: str = "l1",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if examples < 1:
            raise InvalidInputError(f"examples: expected at least 1, got {examples!r}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise InvalidInputError(f"temperature: expected a positive number, got {temperature!r}")
        if not (alpha > 1 and math.isfinite(alpha)):
            raise InvalidInputError(f"alpha: expected a number above 1, got {alpha!r}")
        if normalize not in NORMALIZATIONS:
            raise InvalidInputError(
                f"normalize: expected one of {NORMALIZATIONS}, got {normalize!r}"
            )
        check_reduction(reduction)
        self.temperature, self.alpha, self.margin = temperature, alpha, margin
        self.normalize, self.reduction = normalize, reduction
        self.register_buffer("temperatures", torch.full((examples,), float(temperature)))

    def forward(self, input: Tensor, target: Tensor, index: Tensor) -> Tensor:
        """Loss of a batch; updates the temperatures of its examples in training mode.

        Parameters
        ----------
        input : (N, C) Tensor
            Scores.
        target : (N,) Tensor of integers
            Labels.
        index : (N,) Tensor of integers
            Number of each example, from 0. If one occurs twice, its last row decides.

        Returns
        -------
        Tensor
            Of no dimension, or (N,).

        Raises
        ------
        InvalidInputError
            Shapes that do not fit, or an index out of range.
        """
        if input.ndim != 2 or target.shape != input.shape[:1] or index.shape != target.shape:
            raise InvalidInputError(
                "expected input (N, C), target (N,) and index (N,), got "
                f"{tuple(input.shape)}, {tuple(target.shape)} and {tuple(index.shape)}"
            )
        index = checked_index(index, len(self.temperatures))
        f = _normalized(input, self.normalize)
        classes = input.shape[1]
        widest = self.alpha * math.log(classes) if classes > 1 else math.inf
        old = self.temperatures[index]
        with torch.no_grad():
            p = torch.softmax(f.detach().to(old.dtype) / old[:, None], 1) + 1e-5
            p = p / p.sum(1, keepdim=True)
            divergence = (p * (classes * p).log()).sum(1)
            new = self.temperature * (1 - divergence / widest)
            if self.training:
                self.temperatures[index] = new[last_rows(index)]
        # a margin on every class but the label is one off the label, whatever the row's scale is
        f = f.scatter_add(1, target.long()[:, None], f.new_full((len(f), 1), -self.margin))
        rows = row_cross_entropy(
            f, target, RowLossForm("softmax"), row_scale=1 / new, reduction="none"
        )
        rows = new * (rows - math.log(classes))
        if classes > 1:
            rows = rows - widest / (2 * self.temperature) * (new - self.temperature) ** 2
        return _reduced(rows, torch.ones_like(target, dtype=torch.bool), self.reduction)


def _normalized(scores: Tensor, how: str) -> Tensor:
    """Scores over a mean of theirs; differentiable, so the gradient is dense in the classes."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise DTypeError(f"input: expected a floating torch tensor, got {got}")
    if scores.ndim != 2:
        raise InvalidInputError(f"input: expected scores (N, C), got shape {tuple(scores.shape)}")
    if how == "none":
        return scores
    if how == "softplus":
        f = torch.nn.functional.softplus(scores)
        return f / f.mean(1, keepdim=True)
    if how == "l1":
        return scores / scores.abs().mean(1, keepdim=True).clamp(min=SMALLEST_NORM)
    raise InvalidInputError(f"normalize: expected one of {NORMALIZATIONS}, got {how!r}")


def _reduced(rows: Tensor, keep: Tensor, reduction: str) -> Any:
    check_reduction(reduction)
    if reduction == "none":
        return rows
    return rows.sum() / keep.sum() if reduction == "mean" else rows.sum()
