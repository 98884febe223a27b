"""`QuantLinear`: a linear layer over a frozen quantised weight, with trainable adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flcore import _torch_qmatmul
from flcore.errors import CheckpointError, DTypeError, InvalidInputError
from flcore.nn._quantized import QuantizedModule, rank_and_scaling
from flcore.quantization import QuantizedTensor, Scheme, from_autoawq, from_gptq, gptq_order
from flcore.quantization import quantize as quantize_weight

__all__ = ["QuantLinear"]


class QuantLinear(QuantizedModule):
    """``y = x W^T + bias + alpha / r (x A^T) B^T`` with W in 2 to 8 bits, not trained.

    Made by `from_linear`, `from_quantized`, `from_awq` or `from_gptq`. The product reads the packed
    weight; so does the gradient of x (`flcore.ops.qmatmul_dx`), which takes the adapters along.
    Weights are stored in the layout of the kernels and need a few bits more a value than
    ``scheme.bits`` (`nbytes`).

    Parameters
    ----------
    weight : QuantizedTensor
        W (out_features, in_features).
    bias : (out_features,) Tensor, optional
        Not trained unless ``layer.bias.requires_grad_()``.
    activation_bits : {16, 8}
        16: x as it comes. 8: rows of x are quantised to int8 in the product; gradients pass as if
        they were not (straight-through). Not for codebooks and FP8.
    lora_rank : int
        r, of the adapters ``lora_a`` (r, in) and ``lora_b`` (out, r), float32; 0: none. A starts
        as torch's linear layers do, B as 0.
    lora_alpha : float, optional
        2 r by default.
    input_order : (in_features,) integers, optional
        Order in which W takes its inputs.

    Attributes
    ----------
    in_features, out_features : int
    weight : QuantizedTensor
    bias, lora_a, lora_b : torch.nn.Parameter or None
    scaling : float
        alpha / r.
    nbytes : int
        Bytes of codes, scales and zeros.

    Raises
    ------
    InvalidInputError, DTypeError
        An argument that does not fit; the message names it.

    References
    ----------
    Hu et al., "LoRA", ICLR 2022, arXiv 2106.09685; Dettmers et al., "QLoRA", NeurIPS 2023,
    arXiv 2305.14314.

    Examples
    --------
    >>> import torch
    >>> from flcore.nn import QuantLinear
    >>> layer = QuantLinear.from_linear(torch.nn.Linear(64, 32), "nf4", lora_rank=4)
    >>> [name for name, p in layer.named_parameters() if p.requires_grad]
    ['lora_a', 'lora_b']
    >>> layer(torch.zeros(5, 64)).shape
    torch.Size([5, 32])
    """

    bias: torch.nn.Parameter | None
    lora_a: torch.nn.Parameter | None
    lora_b: torch.nn.Parameter | None
    input_order: Tensor | None

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        activation_bits: int = 16,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        input_order: Any = None,
    ) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = self.shape
        if activation_bits not in (16, 8):
            raise InvalidInputError(f"activation_bits: expected 16 or 8, got {activation_bits!r}")
        if activation_bits == 8 and self.scheme.kind in ("codebook", "fp8"):
            raise DTypeError(
                f"activation_bits: a weight of kind {self.scheme.kind!r} has no integer codes to "
                "multiply with int8; use 16"
            )
        self.activation_bits = activation_bits
        self.lora_rank, self.scaling = rank_and_scaling(lora_rank, lora_alpha)
        device = self.codes.device
        if bias is not None:
            if tuple(bias.shape) != (self.out_features,) or not bias.is_floating_point():
                raise InvalidInputError(
                    f"bias: expected {self.out_features} floats, got {bias.dtype} of shape "
                    f"{tuple(bias.shape)}"
                )
            bias = torch.nn.Parameter(bias.detach().clone().to(device), requires_grad=False)
        self.register_parameter("bias", bias)
        self.lora_a = self.lora_b = None
        if self.lora_rank:
            shapes = (self.lora_rank, self.in_features), (self.out_features, self.lora_rank)
            self.lora_a, self.lora_b = (
                torch.nn.Parameter(torch.empty(shape, device=device)) for shape in shapes
            )
            self.reset_adapters()
        self.register_buffer("input_order", self._order(input_order))

    def _order(self, order: Any) -> Tensor | None:
        if order is None:
            return None
        order = torch.as_tensor(order, dtype=torch.int64)
        if not torch.equal(order.sort().values.cpu(), torch.arange(self.in_features)):
            raise InvalidInputError(
                f"input_order: expected every input of 0 .. {self.in_features - 1} once"
            )
        return order.to(self.codes.device)

    # ---- constructors ----------------------------------------------------------------------------

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, scheme: Scheme | str = "int4", **options: Any
    ) -> QuantLinear:
        """Quantise the weight of a linear layer.

        Parameters
        ----------
        linear : torch.nn.Linear
            Left as it is; its bias is copied.
        scheme : Scheme or str
            As `flcore.quantization.quantize` takes it.
        **options
            `activation_bits`, `lora_rank` and `lora_alpha` of the class.
        """
        if not isinstance(linear, torch.nn.Linear):
            raise DTypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        layer = cls(quantize_weight(linear.weight.detach(), scheme), linear.bias, **options)
        return layer.train(linear.training)

    @classmethod
    def from_quantized(
        cls, weight: QuantizedTensor, bias: Tensor | None = None, **options: Any
    ) -> QuantLinear:
        """Take a finished weight over; `options` as in the class."""
        return cls(weight, bias, **options)

    @classmethod
    def from_awq(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        group_size: int | None = None,
        **options: Any,
    ) -> QuantLinear:
        """Take a layer from an AutoAWQ checkpoint (`flcore.quantization.from_autoawq`)."""
        return cls(from_autoawq(qweight, qzeros, scales, group_size=group_size), bias, **options)

    @classmethod
    def from_gptq(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        bits: int = 4,
        zero_offset: int | None = None,
        config: Mapping[str, Any] | None = None,
        group_size: int | None = None,
        g_idx: Tensor | None = None,
        **options: Any,
    ) -> QuantLinear:
        """Take a layer from a GPTQ checkpoint (`flcore.quantization.from_gptq`).

        Where the groups of `g_idx` are scattered (act-order), the columns of W are sorted by group
        and the layer takes its inputs in the same order.
        """
        order = None
        if g_idx is not None:
            found = gptq_order(g_idx, group_size if group_size and group_size > 0 else None)
            order = None if (found[1:] > found[:-1]).all() else found
        weight = from_gptq(
            qweight,
            qzeros,
            scales,
            bits=bits,
            zero_offset=zero_offset,
            config=config,
            group_size=group_size,
            g_idx=g_idx,
            order=order,
        )
        return cls(weight, bias, input_order=order, **options)

    # ---- use -------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., out_features) of inputs (..., in_features)."""
        if self.input_order is not None:
            x = x[..., self.input_order]
        return _torch_qmatmul.linear(
            x,
            self.parts,
            self.bias,
            self.lora_a,
            self.lora_b,
            scaling=self.scaling,
            activation_bits=self.activation_bits,
            weight=None if torch.compiler.is_compiling() else self.weight,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros as they are held."""
        parts = (self.codes, self.scales, self.zeros)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def reset_adapters(self) -> None:
        """Draw A uniformly within ``1 / sqrt(in_features)``, as torch's linear layers; B = 0."""
        if self.lora_a is None or self.lora_b is None:
            return
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        torch.nn.init.uniform_(self.lora_a, -bound, bound)
        torch.nn.init.zeros_(self.lora_b)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return A and B alone: what a client sends."""
        found = {"lora_a": self.lora_a, "lora_b": self.lora_b}
        return {name: value.detach() for name, value in found.items() if value is not None}

    def dequantize(self) -> Tensor:
        """Return W with the adapters in it, (out_features, in_features) float32.

        In the order in which `forward` takes its inputs.
        """
        w: Tensor = self.weight.dequantize("float32")
        if self.lora_a is not None and self.lora_b is not None:
            w = w + self.scaling * (self.lora_b.detach().float() @ self.lora_a.detach().float())
        if self.input_order is not None:
            w = torch.empty_like(w).index_copy_(1, self.input_order, w)
        return w

    def merge(self, scheme: Scheme | str | None = None) -> torch.nn.Module:
        """Return a new layer with the adapters in its weight.

        Parameters
        ----------
        scheme : Scheme or str, optional
            Quantise the sum with it; None: leave it in float32.

        Returns
        -------
        torch.nn.Linear or QuantLinear
            Without adapters; this layer stays as it is.
        """
        w = self.dequantize()
        if scheme is not None:
            bits = self.activation_bits
            return QuantLinear(quantize_weight(w, scheme), self.bias, activation_bits=bits)
        layer = torch.nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        layer.weight = torch.nn.Parameter(w)
        if self.bias is not None:
            layer.bias = torch.nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        order = state.get(prefix + "input_order")
        if (order is None) != (self.input_order is None):
            raise CheckpointError(
                f"{prefix}input_order: the layer and the state do not both have an order of inputs"
            )
        super()._load_from_state_dict(state, prefix, *rest)

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        text = f"{super().extra_repr()}, bias={self.bias is not None}"
        if self.activation_bits == 8:
            text += ", activation_bits=8"
        if self.lora_rank:
            text += f", lora_rank={self.lora_rank}, scaling={self.scaling:g}"
        return text
