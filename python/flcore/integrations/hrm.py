"""Token losses of the Hierarchical Reasoning Model and of Tiny Recursive Models.

Both projects compute the loss of every token in float64 eager code and divide by the number of
valid tokens of a sequence themselves. These functions take their calls: change the import and keep
the configuration (``loss_type: stablemax_cross_entropy``). Needs torch (``flcore[torch]``).

References
----------
Wang et al., "Hierarchical Reasoning Model", arXiv 2506.21734; Jolicoeur-Martineau, "Less is More:
Recursive Reasoning with Tiny Networks", arXiv 2510.04871.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flcore import _extras

if TYPE_CHECKING:
    from torch import Tensor

torch = _extras.require("torch", "torch")

__all__ = ["IGNORE_LABEL_ID", "softmax_cross_entropy", "stablemax_cross_entropy"]

IGNORE_LABEL_ID = -100


def stablemax_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_LABEL_ID,
    valid_mask: Tensor | None = None,
    *,
    out_dtype: Any = torch.float64,
) -> Tensor:
    """StableMax cross-entropy of every token, not reduced.

    Parameters
    ----------
    logits : (..., V) Tensor, any floating dtype
        Classes last; read in place, also as a slice of a longer sequence, and never overwritten.
    labels : (...) Tensor of an integer type
        int32 and int64 are read as they are.
    ignore_index : int
        Tokens with this label have loss 0 and gradient 0.
    valid_mask : (...) Tensor of bool, optional
        Tokens that count; replaces the comparison with `ignore_index`.
    out_dtype : torch.dtype
        Type of the result: float64, as in both projects. With float32 sums of losses stay in
        float32.

    Returns
    -------
    (...) Tensor
        Loss of each token, 0 for those that do not count. Relative error at most 1e-6 for half and
        single precision logits, 1e-15 for float64 logits.

    Raises
    ------
    LabelError, InvalidInputError, DTypeError, RuntimeError
        As `flcore.losses.stablemax_cross_entropy`.

    Notes
    -----
    The gradient has the dtype of the logits, rounded once from float32. One visit forward, one
    backward: 6 bytes a bfloat16 logit, where the float64 code moves about 460.
    ``torch.compile(fullgraph=True)`` keeps the call in its graph.

    Examples
    --------
    >>> import torch
    >>> from flcore.integrations.hrm import stablemax_cross_entropy
    >>> stablemax_cross_entropy(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
    tensor([[1.3863, 0.0000]], dtype=torch.float64)
    """
    from flcore.losses import stablemax_cross_entropy as loss

    return loss(  # type: ignore[no-any-return]
        logits,
        labels,
        ignore_index=ignore_index,
        reduction="none",
        class_dim=-1,
        valid_mask=valid_mask,
        out_dtype=out_dtype,
    )


def softmax_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_LABEL_ID
) -> Tensor:
    """Softmax cross-entropy of every token in float32, the projects' other `loss_type`.

    Parameters
    ----------
    logits, labels, ignore_index
        As in `stablemax_cross_entropy`.

    Returns
    -------
    (...) Tensor, float32
        Loss of each token, 0 for those with the label `ignore_index`.

    Raises
    ------
    LabelError, InvalidInputError, DTypeError, RuntimeError
        As `flcore.losses.cross_entropy`.
    """
    from flcore.losses import cross_entropy as loss

    return loss(  # type: ignore[no-any-return]
        logits,
        labels,
        ignore_index=ignore_index,
        reduction="none",
        class_dim=-1,
        out_dtype=torch.float32,
    )
