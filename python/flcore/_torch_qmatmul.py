"""torch.library operators of products with quantised weights: fakes, gradients, adapters.

`linear` is what modules call. The weight travels as its parts in the layout "tile16" and a line of
text for its scheme; adapters A (rank, k) and B (n, rank) add ``scaling (x A^T) B^T``. The gradient
of the input is one pass over the packed weight that takes the adapters along:

    low = scaling x A^T,            y = x W^T + bias + low B^T
    g = scaling dY B,              dX = dY W + g A,   dA = g^T x,   dB = dY^T low
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from flcore import _torch_ops
from flcore._torch_calls import is_plain, once
from flcore.errors import DTypeError, InvalidInputError
from flcore.quantization import QuantizedTensor, Scheme

__all__ = [
    "linear",
    "parts_of",
    "qmatmul",
    "qmatmul_dx",
    "qmatmul_int8",
    "scheme_from_text",
    "scheme_text",
]

# a weight in every schema below
_WEIGHT = "Tensor codes, Tensor scales, Tensor? zeros, str scheme, int n, int k"
N_WEIGHT = 6


@functools.lru_cache(maxsize=256)
def scheme_text(scheme: Scheme) -> str:
    """Return a scheme as one line of JSON."""
    return json.dumps(asdict(scheme), sort_keys=True)


@functools.lru_cache(maxsize=256)
def scheme_from_text(text: str) -> Scheme:
    """Return the scheme that `scheme_text` wrote."""
    fields = json.loads(text)
    if isinstance(fields.get("codebook"), list):
        fields["codebook"] = tuple(fields["codebook"])
    return Scheme(**fields)


def _weight(parts: tuple[Any, ...]) -> QuantizedTensor:
    codes, scales, zeros, scheme, n, k = parts
    return QuantizedTensor((n, k), scheme_from_text(scheme), "tile16", codes, scales, zeros)


def parts_of(weight: QuantizedTensor) -> tuple[Any, ...]:
    """Return a weight as the arguments that stand for it in the schemas."""
    tiled = weight.tiled().torch()
    return tiled.codes, tiled.scales, tiled.zeros, scheme_text(weight.scheme), *weight.shape


# ---- products ------------------------------------------------------------------------------------


def _product(activation_bits: int, x: Tensor, weight: QuantizedTensor, **rest: Any) -> Tensor:
    product: Any
    if activation_bits == 8:
        from flcore.ops.qmatmul_int8 import qmatmul_int8 as product
    else:
        from flcore.ops.qmatmul import qmatmul as product
    return product(x, weight, **rest)  # type: ignore[no-any-return]


def _low(x: Tensor, a: Tensor, scaling: float) -> Tensor:
    return (x @ a.to(x.dtype).T).mul_(scaling)


def _forward(activation_bits: int) -> Any:
    def kernel(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        weight = _weight(arguments[:N_WEIGHT])
        bias, a, b, scaling = arguments[N_WEIGHT:]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            low = None if a is None else _low(x, a, scaling)
            y = _product(activation_bits, x, weight, bias=bias, low=low, up=b)
            return y, x.new_empty(0) if low is None else low

    return kernel


def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    n, (a, _, _) = arguments[4], arguments[N_WEIGHT + 1 :]
    lead = x.shape[:-1]
    low = x.new_empty(0) if a is None else x.new_empty((*lead, a.shape[0]))
    return x.new_empty((*lead, n)), low


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codes, scales, zeros, *numbers = inputs[:7]
    bias, a, b, ctx.scaling = inputs[7:]
    ctx.numbers = numbers
    ctx.mark_non_differentiable(output[1])
    # x is needed for A alone: without adapters a layer keeps none of its activations
    kept_x = x if a is not None and ctx.needs_input_grad[8] else None
    kept_low = output[1] if b is not None and ctx.needs_input_grad[9] else None
    ctx.save_for_backward(codes, scales, zeros, a, b, kept_x, kept_low)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    codes, scales, zeros, a, b, x, low = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = da = db = dbias = None
    with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
        rows = dy.reshape(-1, dy.shape[-1])
        g = None if b is None else (rows @ b.to(dy.dtype)).mul_(ctx.scaling)
        if a is not None and needs[8]:
            da = (g.T @ x.reshape(-1, x.shape[-1])).to(a.dtype)  # type: ignore[union-attr]
        if b is not None and needs[9]:
            db = (rows.T @ low.reshape(-1, low.shape[-1])).to(b.dtype)
        if needs[7]:
            dbias = rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
            dbias = dbias.to(ctx.bias_dtype)
    if needs[0]:
        shaped = None if g is None else g.reshape(*dy.shape[:-1], g.shape[-1])
        dx = qmatmul_dx(dy.detach(), codes, scales, zeros, *ctx.numbers, shaped, a)
    dx, da, db, dbias = (None if grad is None else once(grad) for grad in (dx, da, db, dbias))
    return dx, *[None] * N_WEIGHT, dbias, da, db, None


def _gradient(dy: Tensor, *arguments: Any) -> Tensor:
    from flcore.ops.qmatmul_dx import qmatmul_dx as product

    low, up = arguments[N_WEIGHT:]
    with torch.no_grad():
        return product(  # type: ignore[no-any-return]
            dy,
            _weight(arguments[:N_WEIGHT]),
            low=low,
            up=None if up is None else up.detach(),
        )


def _gradient_fake(dy: Tensor, *arguments: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], arguments[5]))


qmatmul_dx = _torch_ops.declare(
    f"qmatmul_dx(Tensor dy, {_WEIGHT}, Tensor? low, Tensor? up) -> Tensor",
    kernel=_gradient,
    fake=_gradient_fake,
    is_gradient=True,
)
qmatmul, qmatmul_int8 = (
    _torch_ops.declare(
        f"{name}(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? a, Tensor? b, float scaling)"
        " -> (Tensor y, Tensor low)",
        kernel=_forward(bits),
        fake=_forward_fake,
        backward=_backward,
        setup=_setup,
    )
    for name, bits in (("qmatmul", 16), ("qmatmul_int8", 8))
)


# ---- what modules call ---------------------------------------------------------------------------


def linear(
    x: Tensor,
    parts: tuple[Any, ...],
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    scaling: float = 1.0,
    activation_bits: int = 16,
    weight: QuantizedTensor | None = None,
) -> Tensor:
    """``x W^T + bias + scaling (x A^T) B^T``, differentiable in x, bias, A and B.

    Parameters
    ----------
    x : (..., k) Tensor
        float32, float16 or bfloat16; float64 is computed by the reference. Under autocast it is
        cast as torch's linear casts it.
    parts : tuple
        W (n, k), frozen, as `parts_of` gives it.
    bias : (n,) Tensor, optional
    a, b : (rank, k) and (n, rank) Tensors, optional
        Adapters.
    scaling : float
        alpha / rank.
    activation_bits : {16, 8}
        8: rows of x are quantised to int8 on the way; the gradient is that of the product with x
        as it was (straight-through).
    weight : QuantizedTensor, optional
        The weight of `parts`, where the caller has it at hand.

    Returns
    -------
    (..., n) Tensor of the dtype of `x`

    Raises
    ------
    InvalidInputError
        A last dimension of `x` other than k.
    DTypeError
        `x` is not floating, or an argument is on another device.
    """
    if not x.is_floating_point():
        raise DTypeError(f"x: expected float32, float16 or bfloat16, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] != parts[5]:
        raise InvalidInputError(
            f"x: expected a last dimension of {parts[5]}, the inputs of the weight, got the shape "
            f"{tuple(x.shape)}"
        )
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    given = [t for t in (x, bias, a, b) if t is not None]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if not differentiable and is_plain(*given, parts[0]):
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            low = None if a is None else _low(x, a, scaling)
            held = _weight(parts) if weight is None else weight
            return _product(activation_bits, x, held, bias=bias, low=low, up=b)
    operator = qmatmul_int8 if activation_bits == 8 else qmatmul
    return operator(x, *parts, bias, a, b, scaling)[0]  # type: ignore[no-any-return]
