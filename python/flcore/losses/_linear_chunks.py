"""Row losses of a linear layer without its logits: a chunk of tokens at a time.

The logits of a chunk are one product into a buffer that every chunk reuses; the row kernel writes
their gradient over them; two more products take it to the hidden states and the classifier. What is
needed beyond inputs and results is that buffer, a twentieth of the logits (`rows_per_chunk`).

Products are formed in the type of the logits, float32 for half types and float64 for float64. Half
types on a CPU, and float16 on a GPU, are widened a block of classes at a time; bfloat16 on a GPU
goes through its tensor cores with float32 results. Gradients are summed over the chunks in the type
of the logits and kept in it until the factor of the backward pass is known, so they are rounded
once, and a float16 gradient is not lost before a loss scale could save it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from flcore.errors import InvalidInputError
from flcore.losses._linear_inputs import Inputs, check
from flcore.ops import _rowloss_prepare as _prepare
from flcore.ops import rowloss as _ops
from flcore.ops.rowloss import RowLossForm, RowStats

__all__ = ["LinearRows", "Parts", "rows_per_chunk"]

SHARE = 20  # of the rows, at most one in so many is in the buffer
LEAST_ROWS = {"cpu": 64, "cuda": 512}  # fewer make the products slow: the classifier is read again
LEAST_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}  # logits below are not worth a second chunk
MOST_ROWS = {"cpu": 1024, "cuda": 8192}  # more make nothing faster
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}  # of a widened block of the classifier


class Parts(Protocol):
    """The other parts of the classes, in other processes."""

    def merge(self, call: Any, rows: Any) -> tuple[Tensor, RowStats]:
        """Losses and sums over all classes from those of this part, in a call that has run."""

    def add(self, x: Tensor) -> None:
        """Sum `x` over the processes, in place."""


def rows_per_chunk(rows: int, classes: int, itemsize: int, device: str) -> int:
    """Rows whose logits are formed at a time.

    A twentieth of the rows, but no fewer than `LEAST_ROWS` or `LEAST_BYTES` of logits and no more
    than `MOST_ROWS`; chunks of about equal size, in whole groups of eight rows.
    """
    least = max(LEAST_ROWS[device], LEAST_BYTES[device] // max(1, classes * itemsize))
    most = max(least, min(rows // SHARE, MOST_ROWS[device]))
    chunks = max(1, -(-rows // most))
    return max(1, min(-(-rows // (8 * chunks)) * 8, most))


class LinearRows:
    """A call: N hidden states, a classifier of V classes, a loss; and its visits of the logits.

    Parameters
    ----------
    inputs : Inputs
        Hidden states (..., D), classifier (V, D), labels (...) or probabilities (..., V), bias (V,)
        and the arrays of the loss.
    form : RowLossForm
        The loss of a row.
    chunk_rows : int, optional
        Rows of a chunk; by default by `rows_per_chunk`.
    product : torch.dtype, optional
        Type of the factors of the products on a GPU; by default that of the inputs.
    parts : Parts, optional
        The other parts of the classes; with ``form.shard``.

    Raises
    ------
    LabelError, InvalidInputError, DTypeError
        As `flcore.losses.stablemax_linear_cross_entropy`.
    """

    def __init__(
        self,
        inputs: Inputs,
        form: RowLossForm,
        chunk_rows: int | None = None,
        product: torch.dtype | None = None,
        parts: Parts | None = None,
    ) -> None:
        check(inputs, product is not None)
        self.form, self.parts, self.product = form, parts, product
        self.shape = tuple(inputs.input.shape[:-1])
        self.dtypes = [inputs.input.dtype, inputs.linear_weight.dtype, inputs.linear_weight.dtype]
        self.hidden = inputs.input.detach().reshape(math.prod(self.shape), inputs.input.shape[-1])
        self.matrix = inputs.linear_weight.detach()
        self.bias = inputs.linear_bias
        if self.bias is not None:
            self.bias, self.dtypes[2] = self.bias.detach(), self.bias.dtype
        self.rows, self.classes = len(self.hidden), len(self.matrix)
        self.device = self.hidden.device.type
        wide = torch.float64 in (self.hidden.dtype, self.matrix.dtype)
        self.compute = torch.float64 if wide else torch.float32
        self.weight, self.log_prior = inputs.weight, inputs.log_prior
        self.keep: Tensor | None = None  # rows that count, on a CPU; the others are never read
        self.present: Tensor | None = None  # (N, 1) on a GPU: whether a row counts
        self._take_targets(inputs)
        size = self.compute.itemsize
        if chunk_rows is None:
            self.step = rows_per_chunk(self.rows, self.classes, size, self.device)
        elif chunk_rows < 1:
            raise InvalidInputError(f"chunk_rows: expected a positive number, got {chunk_rows}")
        else:
            self.step = min(chunk_rows, max(1, self.rows))
        factor = self.hidden.dtype if product is None else product
        self.tensor_cores = (
            self.device == "cuda"
            and factor == torch.bfloat16
            and hasattr(torch.ops.aten.mm, "dtype_out")  # torch 2.8
        )
        if self.tensor_cores:
            self.matrix = self.matrix.to(factor)

    def _take_targets(self, inputs: Inputs) -> None:
        """Check labels and mask, count what 'mean' divides by, leave out rows that do not count."""
        target, valid, form = inputs.target, inputs.valid_mask, self.form
        soft = target.dtype.is_floating_point
        expected = (*self.shape, self.classes) if soft else self.shape
        for name, value, shape in (("target", target, expected), ("valid_mask", valid, self.shape)):
            if isinstance(value, Tensor) and tuple(value.shape) != shape:
                raise InvalidInputError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
        target = target.detach().reshape(self.rows, -1) if soft else target.reshape(-1)
        valid = valid.reshape(-1) if isinstance(valid, Tensor) else valid
        like = self.hidden.new_zeros(self.classes, dtype=self.compute)
        if soft:
            call = self._call(like.expand(0, -1), target[:0], None)
        else:
            call = self._call(like.expand(self.rows, -1), target, valid)
            target = call.labels
        self.target, self.valid = target, valid
        keep = self._counting()
        self.total: Any  # what 'mean' divides by; on a GPU a tensor
        if soft or form.shard:
            self.total = self.rows if keep is None else keep.sum()
        else:
            self.total = _prepare.check_targets(call)[1]
        if keep is None:
            return
        if self.device != "cpu":
            self.present = keep[:, None]
            return
        self.total = float(self.total)
        if not bool(keep.all()):
            self.keep = keep.nonzero().squeeze(1)
            self.target = target[self.keep]
            self.valid = None if valid is None else valid[self.keep]
            self.rows = len(self.keep)

    def _counting(self) -> Tensor | None:
        """(N,) bool: rows that count; None when all do."""
        if self.valid is not None or self.target.ndim == 2:
            return self.valid
        return self.target != self.form.ignore_index

    # ---- visits --------------------------------------------------------------------------------

    def reduced(
        self, mean: bool, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Sum or mean of the losses in float64, and its gradients as `gradients` gives them."""
        scale: Any = 1.0
        if mean and isinstance(self.total, Tensor):
            scale = self.total.to(self.compute).reciprocal().reshape(1)
        elif mean:
            scale = 1 / self.total if self.total else float("nan")
        if any(needs):
            losses, grads = self.gradients(needs, scale=scale)
            assert losses is not None
        else:
            losses, grads = self.losses()[0], [None, None, None]
        loss = losses.sum(dtype=torch.float64)
        return loss / self.total if mean else loss, grads

    def losses(self, stats: bool = False) -> tuple[Tensor, RowStats | None]:
        """Loss of every row in the shape of the labels, and stats for `gradients`."""
        losses = self._vector()
        kept = self._stats() if stats else None
        for first, last, _, logits in self._chunks():
            call = self._call_of(logits, first, last)
            if self.parts is not None:
                losses[first:last], merged = self._merged(call, first, last)
                if kept is not None:
                    for into, value in zip(kept, merged, strict=True):
                        if into is not None:
                            into[first:last] = value
                continue
            call.loss = losses[first:last]
            if kept is not None:
                call.rest, call.own = kept.rest[first:last], kept.own[first:last]
                call.shift = None if kept.shift is None else kept.shift[first:last]
            _ops.run(call, _ops.FORWARD)
        if kept is not None:
            kept = RowStats(*[None if v is None else self._spread(v) for v in kept])
        return self._spread(losses), kept

    def gradients(
        self,
        needs: tuple[bool, bool, bool],
        *,
        scale: Any = 1.0,
        upstream: Tensor | None = None,
        stats: RowStats | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients in hidden states, classifier and bias; losses too without `stats`.

        Parameters
        ----------
        needs : tuple of bool
            Which gradients are wanted; the others are None and cost nothing.
        scale : number, or on a GPU a tensor [1]
            Factor of all gradients.
        upstream : Tensor of the shape of the labels, optional
            Factor of each row.
        stats : RowStats, optional
            From `losses`; without them loss and gradient come from one visit.

        Returns
        -------
        losses : Tensor or None
            In the shape of the labels.
        gradients : list of Tensor or None
            In the type of the logits and the shapes of the inputs.
        """
        rows = None if upstream is None else self._gathered(upstream)
        kept = None if stats is None else [None if v is None else self._gathered(v) for v in stats]
        losses = self._vector() if stats is None else None
        sums = _Gradients(self, needs)
        for first, last, part, logits in self._chunks():
            call = self._call_of(logits, first, last)
            over = None if rows is None else rows[first:last]
            if kept is not None:
                found = RowStats(*[None if v is None else v[first:last] for v in kept])
                _ops.backward(call, logits, found, upstream=over, scale=scale, out=logits)
            elif self.parts is not None:
                assert losses is not None
                losses[first:last], found = self._merged(call, first, last)
                _ops.backward(call, logits, found, upstream=over, scale=scale, out=logits)
            else:
                assert losses is not None
                part_losses, _ = _ops.both(call, logits, upstream=over, scale=scale, out=logits)
                losses[first:last] = part_losses
            sums.add(first, last, part, logits)
        return None if losses is None else self._spread(losses), sums.finish()

    def _merged(self, call: Any, first: int, last: int) -> tuple[Tensor, RowStats]:
        assert self.parts is not None
        _ops.new_stats(call)
        _ops.run(call, _ops.FORWARD)
        rows = range(first, last) if self.keep is None else self.keep[first:last]
        return self.parts.merge(call, rows)

    def _chunks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """First and last row of a chunk, its hidden states, its logits in the one buffer."""
        buffer = self.hidden.new_empty(
            (min(self.step, self.rows), self.classes), dtype=self.compute
        )
        for first in range(0, self.rows, self.step):
            last = min(first + self.step, self.rows)
            part, logits = self._part(first, last), buffer[: last - first]
            if self.tensor_cores:
                torch.mm(part, self.matrix.T, out_dtype=self.compute, out=logits)  # type: ignore[call-overload]
            else:
                for begin, end, block in self.blocks():
                    torch.mm(part, block.T, out=logits[:, begin:end])
            if self.bias is not None:
                logits.add_(self.bias)
            yield first, last, part, logits

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks of classes of the classifier in the type of the logits; one when it has it."""
        if self.matrix.dtype == self.compute:
            yield 0, self.classes, self.matrix
            return
        width = self.matrix.shape[1]
        count = BLOCK_BYTES[self.device] // (self.compute.itemsize * max(1, width))
        count = min(max(64, count), self.classes)
        wide = self.matrix.new_empty((count, width), dtype=self.compute)
        for begin in range(0, self.classes, count):
            end = min(begin + count, self.classes)
            yield begin, end, wide[: end - begin].copy_(self.matrix[begin:end])

    def _part(self, first: int, last: int) -> Tensor:
        if self.keep is not None:
            part = self.hidden.index_select(0, self.keep[first:last])
        else:
            part = self.hidden[first:last]
        if self.present is not None:  # without waiting for the device: 0 where nothing counts
            part = torch.where(self.present[first:last], part, 0)
        return part.to(self.matrix.dtype if self.tensor_cores else self.compute)

    def _call_of(self, logits: Tensor, first: int, last: int) -> Any:
        valid = None if self.valid is None else self.valid[first:last]
        return self._call(logits, self.target[first:last], valid)

    def _call(self, logits: Tensor, target: Tensor, valid: Any) -> Any:
        if target.dtype.is_floating_point:
            target = target.to(self.compute)
        return _prepare.prepare(
            logits, target, self.form, -1, self.weight, self.log_prior, None, valid
        )

    def _vector(self) -> Tensor:
        return self.hidden.new_empty(self.rows, dtype=self.compute)

    def _stats(self) -> RowStats:
        shift = self._vector() if self.form.map == "softmax" else None
        return RowStats(self._vector(), self._vector(), shift)

    def _spread(self, rows: Tensor) -> Tensor:
        """Numbers of the rows that count in the shape of the labels, 0 elsewhere."""
        if self.keep is not None:
            every = rows.new_zeros(len(self.hidden))
            rows = every.index_copy_(0, self.keep, rows)
        return rows.reshape(self.shape)

    def _gathered(self, rows: Tensor) -> Tensor:
        rows = rows.detach().to(self.compute).reshape(-1)
        return rows if self.keep is None else rows[self.keep]


class _Gradients:
    """Sums over the chunks of the gradients that are wanted."""

    def __init__(self, job: LinearRows, needs: tuple[bool, bool, bool]) -> None:
        self.job = job
        hidden, matrix = job.hidden, job.matrix
        self.input = self.matrix = self.bias = None
        if needs[0]:
            new = hidden.new_empty if job.keep is None else hidden.new_zeros
            self.input = new(hidden.shape, dtype=job.compute)
        if needs[1]:
            self.matrix = matrix.new_empty(matrix.shape, dtype=job.compute)
        if needs[2]:
            self.bias = matrix.new_zeros(job.classes, dtype=torch.float64)

    def add(self, first: int, last: int, part: Tensor, grad: Tensor) -> None:
        """Take the gradient in the logits of rows `first` to `last` to the inputs."""
        job = self.job
        if self.bias is not None:
            self.bias += grad.sum(0)
        narrow = grad.to(job.matrix.dtype) if job.tensor_cores else grad
        if self.input is not None:
            self._add_input(first, last, narrow)
        if self.matrix is None:
            return
        if not job.tensor_cores:
            torch.addmm(self.matrix, grad.T, part, beta=int(first > 0), out=self.matrix)
            return
        count = max(64, BLOCK_BYTES["cuda"] // (4 * max(1, part.shape[1])))
        for begin in range(0, job.classes, count):
            into = self.matrix[begin : begin + count]
            product = torch.mm(narrow[:, begin : begin + count].T, part, out_dtype=job.compute)  # type: ignore[call-overload]
            into.add_(product) if first else into.copy_(product)

    def _add_input(self, first: int, last: int, grad: Tensor) -> None:
        job, into = self.job, self.input
        assert into is not None
        if job.keep is None:
            out = into[first:last]
        else:
            out = into.new_empty((last - first, into.shape[1]))
        if job.tensor_cores:
            torch.mm(grad, job.matrix, out_dtype=job.compute, out=out)  # type: ignore[call-overload]
        else:
            for begin, end, block in job.blocks():
                torch.addmm(out, grad[:, begin:end], block, beta=int(begin > 0), out=out)
        if job.keep is not None:
            into.index_copy_(0, job.keep[first:last], out)

    def finish(self) -> list[Tensor | None]:
        """Sums in the shapes of the inputs."""
        job = self.job
        if self.matrix is not None and not job.rows:
            self.matrix.zero_()
        if self.input is not None:
            if job.parts is not None:
                job.parts.add(self.input)
            self.input = self.input.reshape(*job.shape, self.input.shape[1])
        return [self.input, self.matrix, None if self.bias is None else self.bias.to(job.compute)]
