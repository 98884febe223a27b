"""Metrics of logits that outgrow their dtype: softmax collapse and what StableMax makes of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flcore import _arrays
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops import _rowloss_prepare as _prepare
from flcore.ops._rowloss_call import RowLossForm
from flcore.ops.stablemax import collapse_counts

__all__ = ["CollapseMetrics", "softmax_collapse_metrics"]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class CollapseMetrics(NamedTuple):
    """What `softmax_collapse_metrics` found: float64 tensors of no dimension.

    Attributes
    ----------
    softmax_collapse : Tensor
        Fraction of rows whose softmax sum rounds to its largest term: gradient and loss vanish
        when that is the target's.
    zero_loss : Tensor
        Fraction of rows whose softmax cross-entropy is exactly 0.
    largest_logit : Tensor
        Largest absolute value of a logit that is not -inf.
    stablemax_collapse : Tensor
        Fraction of rows that StableMax would lose in the same way.
    """

    softmax_collapse: Tensor
    zero_loss: Tensor
    largest_logit: Tensor
    stablemax_collapse: Tensor


@torch.no_grad()
def softmax_collapse_metrics(
    logits: Tensor,
    target: Tensor,
    *,
    dtype: torch.dtype | None = None,
    ignore_index: int = -100,
    class_dim: int | None = None,
) -> CollapseMetrics:
    """Measure how many rows of logits have lost their softmax loss to rounding.

    With u the unit roundoff of `dtype` and m the largest logit of a row, the softmax of the row has
    collapsed when ``sum_{j != m} exp(z_j - z_m) <= u``: added to the largest term, 1, the rest
    vanishes. One logit above V - 1 equal ones collapses at a gap of ln(V - 1) + 7.62 in float16,
    16.64 in float32 and 36.74 in float64. StableMax collapses when
    ``sum_{j != y} s(z_j) <= u s(z_y)``.

    Parameters
    ----------
    logits : Tensor, float64, float32, float16 or bfloat16
        Logits of any shape.
    target : Tensor of int
        Labels: the shape of `logits` without the classes.
    dtype : torch.dtype, optional
        Type in which the loss is (or would be) computed; by default that of the logits.
    ignore_index : int
        Label of rows that do not count and are not read.
    class_dim : int, optional
        Dimension of the classes; by default 1, or 0 of a single row.

    Returns
    -------
    CollapseMetrics
        NaN when no row counts; `largest_logit` is NaN when a logit is. On the device of the logits,
        which is not waited for.

    Raises
    ------
    LabelError
        On a CPU: a row that counts has a label that is no class.
    InvalidInputError, DTypeError
        Shapes or types that do not fit.

    Notes
    -----
    On a CPU the logits are read once. Exponentials are float32 (float64 for float64 logits), so a
    row within 1e-5 of the threshold may be counted on either side. Underflow of single terms in
    `dtype` is not modelled: it would only add rows.

    References
    ----------
    Prieto, Barsbey, Mediano & Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025,
    arXiv 2501.04697; the first two metrics are those of the code published with it.

    Examples
    --------
    >>> import torch
    >>> from flcore.losses import softmax_collapse_metrics
    >>> logits = torch.tensor([[20.0, 0.0], [10.0, 0.0]])
    >>> found = softmax_collapse_metrics(logits, torch.tensor([0, 1]))
    >>> float(found.softmax_collapse), float(found.largest_logit)
    (0.5, 20.0)
    """
    dtype = logits.dtype if dtype is None and isinstance(logits, Tensor) else dtype
    if dtype not in DTYPES:
        raise DTypeError(f"dtype: expected one of {DTYPES}, got {dtype!r}")
    unit = torch.finfo(dtype).eps / 2
    if class_dim is None:
        class_dim = 1 if _arrays.is_array(logits) and logits.ndim > 1 else 0
    axis = _prepare.class_axis(logits, class_dim)
    if logits.shape[axis] == 0:
        raise InvalidInputError("logits: expected at least one class")
    form = RowLossForm(ignore_index=ignore_index)
    call = _prepare.prepare(logits, target, form, axis)
    if call.labels is None:
        raise DTypeError("target: expected integer labels, got probabilities")
    rows = logits.detach().movedim(axis, -1).reshape(call.rows, call.classes)
    labels = call.labels.long()
    if call.device != "cpu":
        return _on_device(rows, labels, ignore_index, unit)
    _prepare.check_targets(call)
    found = collapse_counts(rows, labels.numpy(), unit, ignore_index)
    count, collapsed, zero_loss, lost, largest, has_nan = found
    share = 1 / count if count else float("nan")
    most = float("nan") if has_nan or not count else largest
    values = (collapsed * share, zero_loss * share, most, lost * share)
    return CollapseMetrics(*(torch.scalar_tensor(v, dtype=torch.float64) for v in values))


def _on_device(x: Tensor, y: Tensor, ignore_index: int, unit: float) -> CollapseMetrics:
    """Compose the metrics of torch operators that wait for nothing."""
    keep = y != ignore_index
    y = torch.where(keep, y, 0).clamp(0, x.shape[1] - 1)[:, None]
    x = x.double() if x.dtype == torch.float64 else x.float()
    most, top = x.max(1, keepdim=True)
    finite = most.isfinite()[:, 0]
    collapsed = finite & ((x - most).exp().scatter(1, top, 0.0).sum(1) <= unit)
    own = x.gather(1, y)
    s = torch.where(x >= 0, 1 + x, 1 / (1 - x))
    s_own = s.gather(1, y)[:, 0]
    lost = finite & (s.scatter(1, y, 0.0).sum(1) <= unit * s_own)
    zero = collapsed & (own == most)[:, 0]
    size = torch.where(x == -torch.inf, 0.0, x.abs()).amax(1)
    largest = torch.where(keep, size, -torch.inf).amax() if len(x) else size.sum()
    count = keep.sum(dtype=torch.float64)
    shares = [(keep & rows).sum(dtype=torch.float64) / count for rows in (collapsed, zero, lost)]
    largest = torch.where(count > 0, largest.double(), torch.nan)
    return CollapseMetrics(shares[0], shares[1], largest, shares[2])
