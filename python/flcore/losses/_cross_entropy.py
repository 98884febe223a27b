"""Cross-entropy of StableMax, softmax and Taylor-softmax, called as `F.cross_entropy` is."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from flcore.losses._row_cross_entropy import log_of_prior, row_cross_entropy
from flcore.ops.rowloss import RowLossForm

__all__ = ["cross_entropy", "stablemax_cross_entropy", "taylor_cross_entropy"]


def stablemax_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    class_dim: int | None = None,
    valid_mask: Tensor | None = None,
    prior: Tensor | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    out_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    inplace_backward: bool = False,
) -> Any:
    r"""Cross-entropy of StableMax: a drop-in for `torch.nn.functional.cross_entropy`.

    With ``s(x) = 1 + x`` for ``x >= 0`` and ``1 / (1 - x)`` below, the probabilities are
    ``s(x_k) / sum_j s(x_j)``. Reads each logit once and, with a reduction to one number, writes its
    gradient in the same visit: twice the bytes of the logits for forward and backward together.

    Parameters
    ----------
    input : Tensor, float64, float32, float16 or bfloat16
        Logits (N, C), (N, C, ...) or (C,). Half types are read as they are, also under autocast.
    target : Tensor
        Labels of an integer type and the shape of `input` without its classes, or probabilities of
        the shape of `input`.
    weight : (C,) Tensor, optional
        Weights of the classes.
    size_average, reduce : bool, optional
        As in torch: deprecated, see `reduction`.
    ignore_index : int
        Rows with this label have loss 0 and gradient 0; their logits are never read.
    reduction : {"mean", "none", "sum"}
        'mean' divides by the sum of the weights of the labels that count (NaN when there are
        none); for probabilities by the number of rows.
    label_smoothing : float
        Share of the target that is spread evenly over the classes.
    class_dim : int, optional
        Dimension of the classes; by default 1, or 0 for a single row.
    valid_mask : Tensor of bool of the shape of the labels, optional
        Rows that count; replaces the comparison with `ignore_index`.
    prior : (C,) Tensor, optional
        Factors of ``s(x_k)``, not negative; 0 masks a class.
    logit_scale : float
        Factor of the logits.
    z_loss : float
        Factor of the square of ``ln sum_j s(x_j)``, added to the loss of every row.
    out_dtype : torch.dtype, optional
        Type of the loss: by default float32, for float64 logits float64.
    return_stats : bool
        Return also ``RowStats(rest, own)``, two numbers a row without a gradient.
    inplace_backward : bool
        The backward pass overwrites the logits with their gradient: no memory for a second
        tensor of their size. The logits must not be needed again. No effect when compiled.

    Returns
    -------
    Tensor, or (Tensor, RowStats)
        Of no dimension, or of the shape of the labels with ``reduction="none"``.

    Raises
    ------
    LabelError
        A label that counts is no class (on a CPU; on a GPU its loss is NaN).
    InvalidInputError, DTypeError
        Shapes, types or devices that do not fit.
    RuntimeError
        In a second derivative: there is none.

    Notes
    -----
    Relative error of the loss at most 1e-6 in float32 for logits of any size, where the usual code
    needs float64: the sum over the other classes R and the term of the target are kept apart, and
    the loss is ``log1p(R / s(x_y))``. A logit of exactly 1 or -inf has the gradient of the formula;
    eager code with `torch.where` has NaN there. A NaN or +inf makes loss and gradient of its row
    NaN. Results do not depend on the number of threads. The gradient has the type of `input`,
    rounded once; it is not the gradient of a loss that is invariant to shifts, so its sum over the
    classes is not 0.

    References
    ----------
    Prieto et al., "Grokking at the Edge of Numerical Stability", ICLR 2025, arXiv 2501.04697.

    Examples
    --------
    >>> import torch
    >>> from flcore.losses import stablemax_cross_entropy
    >>> logits = torch.tensor([[2.0, 0.0, -1.0, -3.0]], requires_grad=True)
    >>> loss = stablemax_cross_entropy(logits, torch.tensor([0]))
    >>> loss.backward()
    >>> loss.detach(), logits.grad
    (tensor(0.4595), tensor([[-0.1228,  0.2105,  0.0526,  0.0132]]))
    """
    return row_cross_entropy(
        input,
        target,
        _form("stablemax", ignore_index, label_smoothing, logit_scale, z_loss),
        weight=weight,
        log_prior=log_of_prior(prior),
        valid_mask=valid_mask,
        reduction=_reduction(size_average, reduce, reduction),
        class_dim=class_dim,
        out_dtype=out_dtype,
        inplace_backward=inplace_backward,
        return_stats=return_stats,
    )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    class_dim: int | None = None,
    valid_mask: Tensor | None = None,
    log_prior: Tensor | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    out_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    inplace_backward: bool = False,
) -> Any:
    r"""Softmax cross-entropy whose loss does not vanish before its logits do.

    The value of `torch.nn.functional.cross_entropy`, from one visit of the logits and with
    ``R = sum_{k != y} exp(x_k - max)`` kept apart from the term of the target: loss and gradient of
    a row that is all but certain keep their digits until exp underflows, at a lead of 87 and more
    in float32, where the usual form is 0 from a lead of 17 on.

    Parameters
    ----------
    input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As in `stablemax_cross_entropy`.
    class_dim, valid_mask, logit_scale, z_loss, out_dtype, return_stats, inplace_backward
        As in `stablemax_cross_entropy`; the sum of a z-loss is ``sum_j exp(x_j)``, and the stats
        have a third number, the shift of the exponents.
    log_prior : (C,) Tensor, optional
        Added to the logits; -inf masks a class.

    Returns
    -------
    Tensor, or (Tensor, RowStats)
        As in `stablemax_cross_entropy`.

    Raises
    ------
    LabelError, InvalidInputError, DTypeError, RuntimeError
        As in `stablemax_cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from flcore.losses import cross_entropy
    >>> cross_entropy(torch.tensor([[40.0, 0.0]]), torch.tensor([0]))
    tensor(4.2484e-18)
    """
    return row_cross_entropy(
        input,
        target,
        _form("softmax", ignore_index, label_smoothing, logit_scale, z_loss),
        weight=weight,
        log_prior=log_prior,
        valid_mask=valid_mask,
        reduction=_reduction(size_average, reduce, reduction),
        class_dim=class_dim,
        out_dtype=out_dtype,
        inplace_backward=inplace_backward,
        return_stats=return_stats,
    )


def taylor_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    class_dim: int | None = None,
    valid_mask: Tensor | None = None,
    prior: Tensor | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    out_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    inplace_backward: bool = False,
) -> Any:
    r"""Cross-entropy of the Taylor-softmax, ``f(x) = 1 + x + x^2 / 2``: a baseline.

    f falls below -1, so that very negative logits become probable again.

    Parameters
    ----------
    input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As in `stablemax_cross_entropy`.
    class_dim, valid_mask, prior, logit_scale, z_loss, out_dtype, return_stats, inplace_backward
        As in `stablemax_cross_entropy`.

    Returns
    -------
    Tensor, or (Tensor, RowStats)
        As in `stablemax_cross_entropy`.

    Raises
    ------
    LabelError, InvalidInputError, DTypeError, RuntimeError
        As in `stablemax_cross_entropy`.

    References
    ----------
    de Brebisson and Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical
    Loss Family", ICLR 2016, arXiv 1511.05042.
    """
    return row_cross_entropy(
        input,
        target,
        _form("taylor", ignore_index, label_smoothing, logit_scale, z_loss),
        weight=weight,
        log_prior=log_of_prior(prior),
        valid_mask=valid_mask,
        reduction=_reduction(size_average, reduce, reduction),
        class_dim=class_dim,
        out_dtype=out_dtype,
        inplace_backward=inplace_backward,
        return_stats=return_stats,
    )


def _form(
    name: str, ignore_index: int, label_smoothing: float, logit_scale: float, z_loss: float
) -> RowLossForm:
    make = RowLossForm if torch.compiler.is_compiling() else _known_form
    return make(name, ignore_index, label_smoothing, logit_scale, 0.0, z_loss)


_known_form = functools.lru_cache(maxsize=256)(RowLossForm)  # checks its numbers once


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Reduction that torch's two deprecated arguments stand for."""
    if size_average is None and reduce is None:
        return reduction
    warnings.warn(
        "size_average and reduce are deprecated: use reduction", FutureWarning, stacklevel=3
    )
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"
