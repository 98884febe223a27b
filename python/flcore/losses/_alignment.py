"""Losses on features: pull a representation towards one set of vectors and away from another.

Plain torch operations on (n, F) features, with a weight for each example, so that they also run
under `torch.func.vmap`, where padding has weight 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flcore.errors import InvalidInputError

__all__ = [
    "model_contrastive_loss",
    "multi_kernel_mmd",
    "reverse_gradient",
    "supervised_contrastive_loss",
]

COSINE_FLOOR = 1e-8
"""Least length that a vector is taken to have in a cosine."""


def model_contrastive_loss(
    features: Tensor,
    towards: Tensor,
    away: Tensor,
    *,
    temperature: float = 0.5,
    known: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Contrast of one representation with that of two models (MOON).

    .. math::
        \ell = -\log \frac{e^{\cos(z, z_g) / T}}{e^{\cos(z, z_g) / T} + \sum_j e^{\cos(z, z_j) / T}}

    Parameters
    ----------
    features : (n, F) Tensor
        z, of the model in training.
    towards : (n, F) Tensor
        z_g, of the global model.
    away : (n, F) or (k, n, F) Tensor
        z_j, of one or several previous local models; k may be 0.
    temperature : float
        T.
    known : (k,) Tensor, optional
        Leave out the previous models where this is 0.  Without any, the loss and its gradient
        are 0.
    weight : (n,) Tensor, optional
        Of the examples in the sum; None: the mean.

    Returns
    -------
    Tensor of no dimension.

    Raises
    ------
    InvalidInputError
        If shapes do not fit, or the temperature is not above 0.

    References
    ----------
    Li et al., "Model-Contrastive Federated Learning", CVPR 2021, arXiv 2103.16257.

    Examples
    --------
    >>> import torch
    >>> from flcore.losses import model_contrastive_loss
    >>> z = torch.tensor([[1.0, 0.0]])
    >>> model_contrastive_loss(z, torch.tensor([[0.6, 0.8]]), torch.tensor([[0.0, 1.0]]))
    tensor(0.2633)
    """
    if away.ndim == features.ndim:
        away = away[None]
    if features.ndim != 2 or towards.shape != features.shape or away.shape[1:] != features.shape:
        raise InvalidInputError(
            "expected features (n, F), towards (n, F) and away (k, n, F), got "
            f"{tuple(features.shape)}, {tuple(towards.shape)} and {tuple(away.shape)}"
        )
    _check_temperature(temperature)
    others = torch.cat([towards[None], away])
    scores = torch.cosine_similarity(features[None], others, dim=2, eps=COSINE_FLOOR) / temperature
    if known is not None:
        keep = torch.cat([known.new_ones(1), known]) > 0
        scores = scores.masked_fill(~keep[:, None], -torch.inf)
    losses = torch.logsumexp(scores, 0) - scores[0]
    return losses.mean() if weight is None else (losses * weight).sum()


def supervised_contrastive_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.07,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Pull features of one class together, and all others apart.

    With :math:`P(i)` the other rows of the class of row i, features scaled to length 1,

    .. math::
        \ell = \operatorname{mean}_i \frac{-1}{\max(1, |P(i)|)} \sum_{p \in P(i)}
            \log \frac{e^{z_i \cdot z_p / T}}{\sum_{a \ne i} e^{z_i \cdot z_a / T}}

    Parameters
    ----------
    features : (n, F) Tensor
    labels : (n,) Tensor of integers
    temperature : float
        T.
    weight : (n,) Tensor, optional
        Rows of weight 0 are left out altogether, as if they were not there; the others count
        alike.

    Returns
    -------
    Tensor of no dimension; 0 if no row has another of its class.

    Raises
    ------
    InvalidInputError
        If shapes do not fit, or the temperature is not above 0.

    Notes
    -----
    Needs n^2 similarities.

    References
    ----------
    Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv 2004.11362.

    Examples
    --------
    >>> import torch
    >>> from flcore.losses import supervised_contrastive_loss
    >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> supervised_contrastive_loss(z, torch.tensor([0, 0, 1]), temperature=1.0)
    tensor(0.2088)
    """
    n = features.shape[0]
    if features.ndim != 2 or labels.shape != (n,) or (weight is not None and weight.shape != (n,)):
        raise InvalidInputError(
            "expected features (n, F), labels (n,) and weight (n,) or None, got "
            f"{tuple(features.shape)}, {tuple(labels.shape)} and "
            f"{None if weight is None else tuple(weight.shape)}"
        )
    _check_temperature(temperature)
    there = labels == labels if weight is None else weight > 0
    z = torch.nn.functional.normalize(features, dim=1)
    other = there & ~torch.eye(n, dtype=torch.bool, device=features.device)
    # A finite stand-in for -inf: a row without any other must give 0, and a gradient of 0.
    scores = (z @ z.T / temperature).masked_fill(~other, -1e30)
    positive = other & (labels[:, None] == labels) & there[:, None]
    logs = scores - torch.logsumexp(scores, 1, keepdim=True)
    each = (logs * positive).sum(1) / positive.sum(1).clamp(min=1)
    return -each.sum() / there.sum().clamp(min=1)


def multi_kernel_mmd(
    first: Tensor, second: Tensor, *, kernels: int = 5, factor: float = 2.0
) -> Tensor:
    r"""Maximum mean discrepancy of two samples under a sum of Gaussian kernels.

    With :math:`D_{ij}` the squared distances of all 2n rows,

    .. math::
        s = \frac{\sum_{ij} D_{ij}}{(2n)^2 - 2n} \, f^{-\lfloor Q / 2 \rfloor}, \qquad
        k_{ij} = \sum_{q=0}^{Q-1} e^{-D_{ij} / (s f^q)}, \qquad
        \operatorname{MMD} = \operatorname{mean}(k_{ss} + k_{tt} - k_{st} - k_{ts})

    The bandwidth s is a constant of the gradient.  The diagonal is included (biased form).

    Parameters
    ----------
    first, second : (n, F) Tensor
        As many rows in each.
    kernels : int
        Q.
    factor : float
        f, between the bandwidths.

    Returns
    -------
    Tensor of no dimension, from 0; 0 where all rows are equal.

    Raises
    ------
    InvalidInputError
        If the shapes differ, or a number is out of range.

    References
    ----------
    Long et al., "Learning Transferable Features with Deep Adaptation Networks", ICML 2015; this
    form: Sun et al., "Feature Distribution Matching for Federated Domain Generalization", ACML
    2022, arXiv 2203.11635.

    Examples
    --------
    >>> import torch
    >>> from flcore.losses import multi_kernel_mmd
    >>> s, t = torch.tensor([[0.0, 0], [1, 0]]), torch.tensor([[0.0, 1], [2, 2]])
    >>> multi_kernel_mmd(s, t)
    tensor(3.1483)
    """
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        raise InvalidInputError(
            "expected two samples (n, F) of one shape, n from 1, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    if kernels < 1 or not factor > 0:
        raise InvalidInputError(
            f"expected kernels from 1 and factor above 0, got {kernels!r} and {factor!r}"
        )
    both = torch.cat([first, second])
    rows = len(both)
    distances = (both[:, None] - both[None]).square().sum(2)
    base = distances.detach().sum() / (rows * rows - rows) / factor ** (kernels // 2)
    # All rows equal: every distance is 0, and any bandwidth says so.
    base = torch.where(base > 0, base, torch.ones_like(base))
    each = [torch.exp(-distances / (base * factor**q)) for q in range(kernels)]
    k = torch.stack(each).sum(0)
    n = len(first)
    return (k[:n, :n] + k[n:, n:] - k[:n, n:] - k[n:, :n]).mean()


def reverse_gradient(x: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    """Give `x` itself, but ``-strength`` times the gradient to what comes before.

    Parameters
    ----------
    x : Tensor
    strength : float or Tensor of no dimension
        0 or more.

    Returns
    -------
    Tensor, bitwise `x`.

    References
    ----------
    Ganin and Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", ICML 2015.

    Examples
    --------
    >>> import torch
    >>> from flcore.losses import reverse_gradient
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> reverse_gradient(x, 0.5).sum().backward()
    >>> x.grad
    tensor([-0.5000, -0.5000])
    """
    strength = torch.as_tensor(strength, dtype=x.dtype, device=x.device)
    if strength.ndim:
        raise InvalidInputError(f"strength: expected one number, got shape {tuple(strength.shape)}")
    return _Reversal.apply(x, strength)


class _Reversal(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, strength: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (strength,) = ctx.saved_tensors
        return -strength * gradient, None


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InvalidInputError(f"temperature: expected a number above 0, got {temperature!r}")
