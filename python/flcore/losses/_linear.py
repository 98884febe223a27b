"""Cross-entropy of a linear layer: hidden states and classifier in, no logits in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flcore._torch_calls import is_plain
from flcore.errors import InvalidInputError
from flcore.losses import _linear_engine as _engine
from flcore.losses import _row_cross_entropy as _rows
from flcore.losses._linear_inputs import Inputs
from flcore.losses._row_cross_entropy import log_of_prior
from flcore.ops.rowloss import RowLossForm

__all__ = ["linear_cross_entropy", "linear_row_cross_entropy", "stablemax_linear_cross_entropy"]


def stablemax_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    valid_mask: Tensor | None = None,
    prior: Tensor | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    out_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    process_group: Any = None,
    label_offset: int | None = None,
) -> Tensor:
    r"""StableMax cross-entropy of ``input @ linear_weight.T + linear_bias`` without those logits.

    Logits are formed for a chunk of rows at a time, in one buffer, and replaced there by their
    gradient, which goes on to the hidden states and the classifier at once. Memory beyond inputs
    and gradients is that buffer: a twentieth of the logits. With a reduction to one number the
    forward pass does all the work, in the three products that any method needs, or two when the
    classifier needs no gradient; ``reduction="none"`` forms the logits again in the backward pass,
    when the factors of the rows are known. No entry of the gradient is left out.

    Parameters
    ----------
    input : (..., D) Tensor, float64, float32, float16 or bfloat16
        Hidden states, a row for each label.
    linear_weight : (V, D) Tensor of the dtype of `input`
        Classifier: one row for each class.
    target : Tensor
        Labels (...), or probabilities (..., V).
    linear_bias : (V,) Tensor, optional
        Bias of the classifier.
    weight, label_smoothing, valid_mask, logit_scale, z_loss, out_dtype
        As in `flcore.losses.stablemax_cross_entropy`.
    ignore_index : int
        Rows with this label have loss 0 and gradient 0; on a CPU nothing is computed for them.
        None stands for -100.
    reduction : {"mean", "none", "sum"}
        'mean' divides by the sum of the weights of the labels that count.
    prior : (V,) Tensor, optional
        Factors of the element map, not negative; 0 masks a class.
    chunk_rows : int, optional
        Rows of a chunk; by default a twentieth of all that count, at least 64 (on a GPU 512) or
        1 MiB (64 MiB) of logits, at most 1,024 (8,192).
    process_group : torch.distributed.ProcessGroup, optional
        `linear_weight` (and `linear_bias`, `prior`) is the part of the classes of this process;
        `input` and `target` are the same everywhere. Two sums a row are exchanged for each chunk,
        and all processes get the loss. The gradient in `input` is summed over the processes in
        here; do not sum it again. Takes no `weight` and no `label_smoothing`, and labels, not
        probabilities.
    label_offset : int, optional
        Label of the first class of this part; by default rank times V, for parts of equal size.

    Returns
    -------
    Tensor
        Of no dimension, or of the shape of the labels with ``reduction="none"``; float32 for half
        types.

    Raises
    ------
    LabelError
        On a CPU: a label that counts is no class. (On a GPU its loss is NaN.)
    InvalidInputError, DTypeError
        Shapes, types or devices that do not fit.
    RuntimeError
        In a second derivative: there is none.

    Notes
    -----
    Logits are float32 (float64) whatever the inputs. For half types on a CPU, and float16 on a GPU,
    so are the factors of the products; bfloat16 on a GPU uses tensor cores, with float32 results
    and the gradient in the logits rounded to bfloat16. All gradients are summed in float32 and, for
    half types, rounded once, in the backward pass and after its factor: until then they take 4
    bytes an entry. Under autocast the matrices may have different types,
    and bfloat16 there means bfloat16 factors on a GPU.

    References
    ----------
    Prieto et al., "Grokking at the Edge of Numerical Stability", ICLR 2025, arXiv 2501.04697.
    Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025,
    arXiv 2411.09009: losses without logits; its filter of small gradients does not suit StableMax.

    Examples
    --------
    >>> import torch
    >>> from flcore.losses import stablemax_linear_cross_entropy
    >>> hidden = torch.ones(5, 3, requires_grad=True)
    >>> classifier = torch.zeros(7, 3, requires_grad=True)
    >>> loss = stablemax_linear_cross_entropy(hidden, classifier, torch.arange(5))
    >>> loss.backward()
    >>> round(loss.item(), 6)
    1.94591
    >>> classifier.grad[:, 0]
    tensor([-0.0571, -0.0571, -0.0571, -0.0571, -0.0571,  0.1429,  0.1429])
    """
    return linear_row_cross_entropy(
        Inputs(input, linear_weight, target, linear_bias, weight, log_of_prior(prior), valid_mask),
        RowLossForm("stablemax", _index(ignore_index), label_smoothing, logit_scale, z_loss=z_loss),
        reduction=reduction,
        out_dtype=out_dtype,
        chunk_rows=chunk_rows,
        process_group=process_group,
        label_offset=label_offset,
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    valid_mask: Tensor | None = None,
    log_prior: Tensor | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    out_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    process_group: Any = None,
    label_offset: int | None = None,
) -> Tensor:
    r"""Softmax cross-entropy of a linear layer without its logits.

    The value of `torch.nn.functional.linear_cross_entropy`, with the digits of
    `flcore.losses.cross_entropy` and the memory of `stablemax_linear_cross_entropy`.

    Parameters
    ----------
    input, linear_weight, target, linear_bias, weight, ignore_index, reduction, label_smoothing
        As in `stablemax_linear_cross_entropy`.
    valid_mask, logit_scale, z_loss, out_dtype, chunk_rows, process_group, label_offset
        As in `stablemax_linear_cross_entropy`; processes exchange the maximum of a row too.
    log_prior : (V,) Tensor, optional
        Added to the logits; -inf masks a class.

    Returns
    -------
    Tensor
        As in `stablemax_linear_cross_entropy`.

    Raises
    ------
    LabelError, InvalidInputError, DTypeError, RuntimeError
        As in `stablemax_linear_cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from flcore.losses import linear_cross_entropy
    >>> linear_cross_entropy(torch.ones(1, 1), torch.tensor([[40.0], [0.0]]), torch.tensor([0]))
    tensor(4.2484e-18)
    """
    return linear_row_cross_entropy(
        Inputs(input, linear_weight, target, linear_bias, weight, log_prior, valid_mask),
        RowLossForm("softmax", _index(ignore_index), label_smoothing, logit_scale, z_loss=z_loss),
        reduction=reduction,
        out_dtype=out_dtype,
        chunk_rows=chunk_rows,
        process_group=process_group,
        label_offset=label_offset,
    )


def linear_row_cross_entropy(
    inputs: Inputs,
    form: RowLossForm,
    *,
    reduction: str = "mean",
    out_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    process_group: Any = None,
    label_offset: int | None = None,
) -> Tensor:
    """Any row loss of a linear layer; see `stablemax_linear_cross_entropy`.

    Parameters
    ----------
    inputs : Inputs
        Tensors of the call.
    form : RowLossForm
        The loss of a row.
    reduction, out_dtype, chunk_rows, process_group, label_offset
        As in `stablemax_linear_cross_entropy`.

    Returns
    -------
    Tensor
        As in `stablemax_linear_cross_entropy`.

    Raises
    ------
    LabelError, InvalidInputError, DTypeError
        As in `stablemax_linear_cross_entropy`.
    """
    _rows.check_reduction(reduction)
    if process_group is None and label_offset is not None:
        raise InvalidInputError("label_offset: needs a process_group")
    for name in ("target", "weight", "log_prior"):
        value = getattr(inputs, name)
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise InvalidInputError(
                f"{name}: this loss has gradients in input, linear_weight and linear_bias alone; "
                f"detach {name}"
            )
    product = _autocast(inputs.input)
    if process_group is not None:
        from flcore.losses import _vocab_parallel

        loss = _vocab_parallel.linear_rows(
            inputs, form, reduction, chunk_rows, product, process_group, label_offset
        )
    elif torch.compiler.is_compiling():
        loss = _registered(inputs, form, reduction, chunk_rows, product)
    elif torch._C._functorch.peek_interpreter_stack() is not None:
        return _whole(inputs, form, reduction, out_dtype)
    elif is_plain(*inputs[:3]):
        loss = _engine.eager(inputs, form, reduction, chunk_rows, product)
    else:
        loss = _registered(inputs, form, reduction, chunk_rows, product)
    if out_dtype is not None:
        return loss.to(out_dtype)
    wide = torch.float64 in (inputs.input.dtype, inputs.linear_weight.dtype)
    return loss if wide else loss.float()


# ---- other kinds of tensors ----------------------------------------------------------------------


def _registered(
    inputs: Inputs,
    form: RowLossForm,
    reduction: str,
    chunk_rows: int | None,
    product: torch.dtype | None,
) -> Tensor:
    from flcore import _torch_linear

    return _torch_linear.loss(inputs, form, reduction, chunk_rows, product)


def _whole(
    inputs: Inputs, form: RowLossForm, reduction: str, out_dtype: torch.dtype | None
) -> Tensor:
    """Loss under a transform of torch.func, from whole logits: what it maps has no chunks."""
    logits = torch.nn.functional.linear(inputs.input, inputs.linear_weight, inputs.linear_bias)
    return _rows.row_cross_entropy(  # type: ignore[no-any-return]
        logits,
        inputs.target,
        form,
        weight=inputs.weight,
        log_prior=inputs.log_prior,
        valid_mask=inputs.valid_mask,
        reduction=reduction,
        class_dim=-1,
        out_dtype=out_dtype,
    )


def _autocast(input: Any) -> torch.dtype | None:
    """Autocast's type of the products, None where it is off."""
    if not isinstance(input, Tensor) or input.device.type not in ("cpu", "cuda"):
        return None
    kind = input.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _index(ignore_index: int | None) -> int:
    return -100 if ignore_index is None else ignore_index
