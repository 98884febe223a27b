"""`QuantEmbedding` and `QuantEmbeddingBag`: tables of embeddings in few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flcore import _torch_qembedding
from flcore.errors import DTypeError, InvalidInputError
from flcore.nn._quantized import QuantizedModule
from flcore.ops.qembedding import qembedding_grad
from flcore.quantization import QuantizedTensor, Scheme
from flcore.quantization import quantize as quantize_weight

__all__ = ["QuantEmbedding", "QuantEmbeddingBag"]


class _Table(QuantizedModule):
    """Shared by both modules: the table in the layout "rows", and the gradients of its rows."""

    LAYOUT = "rows"
    MODE = "none"

    def __init__(
        self,
        weight: QuantizedTensor,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        track_rows: bool = False,
    ) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = self.shape
        if padding_idx is not None and not (
            -self.num_embeddings <= padding_idx < self.num_embeddings
        ):
            raise InvalidInputError(
                f"padding_idx: expected a row of {self.num_embeddings}, got {padding_idx}"
            )
        self.padding_idx, self.dtype, self.track_rows = padding_idx, dtype, track_rows
        self.mode = self.MODE
        self.row_grad: Tensor | None = None

    def _bags(
        self, input: Tensor, offsets: Tensor | None = None, factors: Tensor | None = None
    ) -> Tensor:
        out = _torch_qembedding.bags(
            self.parts, input, offsets, factors, mode=self.mode, padding_idx=self.padding_idx
        )
        out = out.to(self.dtype)
        if self.track_rows and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if not out.requires_grad:
                out.requires_grad_()
            factors = None if factors is None else factors.detach()
            out.register_hook(lambda grad: self._add_row_grad(grad, input, offsets, factors))
        return out

    def _add_row_grad(
        self, grad: Tensor, input: Tensor, offsets: Tensor | None, factors: Tensor | None
    ) -> None:
        if self.row_grad is None:
            self.row_grad = torch.zeros(self.shape, device=grad.device)
        qembedding_grad(
            grad,
            input,
            offsets,
            rows=self.num_embeddings,
            mode=self.mode,
            per_sample_weights=factors,
            padding_idx=self.padding_idx,
            out=self.row_grad,
        )
        if self.padding_idx is not None and self.mode == "none":
            self.row_grad[self.padding_idx] = 0

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        n, k = self.shape
        text = super().extra_repr().split(", ", 2)[2]
        return f"{n}, {k}, {text}" + (f", mode={self.mode!r}" if self.mode != "none" else "")


class QuantEmbedding(_Table):
    """Rows of a table in 2 to 8 bits, decoded as they are read.

    Parameters
    ----------
    weight : QuantizedTensor
        Table (num_embeddings, embedding_dim); not trained.
    padding_idx : int, optional
        Row that gets no gradient.
    dtype : torch.dtype
        Of the result: float32, float16 or bfloat16.
    track_rows : bool
        Add up the gradients of the rows in `row_grad`, for a server that keeps the table in
        floats. Eager mode only.

    Attributes
    ----------
    weight : QuantizedTensor
    row_grad : (num_embeddings, embedding_dim) float32 Tensor or None
        Scatter-add of all gradients since it was None; None before the first.

    Raises
    ------
    InvalidInputError, DTypeError
        An argument that does not fit.

    Examples
    --------
    >>> import torch
    >>> from flcore.nn import QuantEmbedding
    >>> table = QuantEmbedding.from_embedding(torch.nn.Embedding(1000, 64), "int8")
    >>> table(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 64])
    """

    @classmethod
    def from_embedding(
        cls, embedding: torch.nn.Embedding, scheme: Scheme | str = "int8", **options: Any
    ) -> QuantEmbedding:
        """Quantise a `torch.nn.Embedding`; ``max_norm`` is not supported."""
        if not isinstance(embedding, torch.nn.Embedding):
            raise DTypeError(
                f"embedding: expected a torch.nn.Embedding, got {type(embedding).__name__}"
            )
        _check_options(embedding)
        weight = quantize_weight(embedding.weight.detach(), scheme)
        options = {"padding_idx": embedding.padding_idx, "dtype": embedding.weight.dtype, **options}
        return cls(weight, **options)

    def forward(self, input: Tensor) -> Tensor:
        """Rows (*input.shape, embedding_dim)."""
        return self._bags(input)


class QuantEmbeddingBag(_Table):
    """Sums or means of rows of a table in 2 to 8 bits; no row is stored in floats on the way.

    Parameters
    ----------
    weight : QuantizedTensor
        Table (num_embeddings, embedding_dim); not trained.
    mode : {"mean", "sum"}
        Of each bag.
    padding_idx : int, optional
        Row whose entries do not count.
    dtype : torch.dtype
        Of the result: float32, float16 or bfloat16.
    track_rows : bool
        As in `QuantEmbedding`.

    Attributes
    ----------
    weight : QuantizedTensor
    row_grad : (num_embeddings, embedding_dim) float32 Tensor or None

    Raises
    ------
    InvalidInputError, DTypeError
        An argument that does not fit.
    """

    def __init__(self, weight: QuantizedTensor, *, mode: str = "mean", **options: Any) -> None:
        if mode not in ("mean", "sum"):
            raise InvalidInputError(f"mode: expected mean or sum, got {mode!r}")
        super().__init__(weight, **options)
        self.mode = mode

    @classmethod
    def from_embedding_bag(
        cls, bag: torch.nn.EmbeddingBag, scheme: Scheme | str = "int8", **options: Any
    ) -> QuantEmbeddingBag:
        """Quantise a `torch.nn.EmbeddingBag` of mode mean or sum; no ``max_norm``."""
        if not isinstance(bag, torch.nn.EmbeddingBag):
            raise DTypeError(f"bag: expected a torch.nn.EmbeddingBag, got {type(bag).__name__}")
        _check_options(bag)
        if bag.include_last_offset:
            raise InvalidInputError("bag: include_last_offset is not supported")
        options = {
            "mode": bag.mode,
            "padding_idx": bag.padding_idx,
            "dtype": bag.weight.dtype,
            **options,
        }
        return cls(quantize_weight(bag.weight.detach(), scheme), **options)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Bags (bags, embedding_dim): `input` (bags, entries), or one-dimensional with `offsets`.

        `per_sample_weights`, of the shape of `input`, are factors for the mode sum.
        """
        return self._bags(input, offsets, per_sample_weights)


def _check_options(module: Any) -> None:
    if module.max_norm is not None:
        raise InvalidInputError("max_norm: a quantised table is not renormalised; expected None")
