"""Errors that a search minimises, and functions through which linears act together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flcore._extras import require
from flcore.errors import InvalidInputError
from flcore.quantization.preparation._capture import Recorded, first_tensor
from flcore.quantization.preparation._statistics import select_tokens

__all__ = [
    "Gated",
    "JointAttention",
    "at_least_float",
    "gram",
    "gram_loss",
    "joint_outputs",
    "linear_loss",
    "rerun",
    "squared_errors",
    "with_weights",
]

torch: Any = require("torch", extra="torch")

# Tokens whose outer products are added up at a time: the float64 copy of them stays small.
CHUNK = 4096


def gram(x: Any) -> Any:
    """Return H = X^T X, [K, K] float64, of X [T, K].

    The H of several clients add up to that of their data pooled.
    """
    total = x.new_zeros((x.shape[1], x.shape[1]), dtype=torch.float64)
    for part in x.split(CHUNK):
        wide = part.double()
        total.addmm_(wide.T, wide)
    return total


def gram_loss(delta: Any, h: Any, tokens: int) -> float:
    """Mean squared output error of a linear whose weights are off by `delta`, without a forward.

    ``||X delta^T||^2 / (T N) = sum_n delta_n H delta_n^T / (T N)``

    Parameters
    ----------
    delta : torch.Tensor, [N, K]
    h : torch.Tensor, [K, K]
        `gram` of the inputs.
    tokens : int
        T.
    """
    delta = delta.to(h.dtype)
    return float(((delta @ h) * delta).sum()) / (tokens * delta.shape[0])


def squared_errors(got: Sequence[Any], want: Sequence[Any], masks: Sequence[Any]) -> tuple:
    """Return the sum of squared differences (in float32 at least), elements and tokens."""
    total, elements, tokens = 0.0, 0, 0
    for a, b, mask in zip(got, want, masks, strict=True):
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        difference = a.to(wide) - b.to(wide)
        if mask is not None and tuple(difference.shape[: mask.ndim]) == tuple(mask.shape):
            difference = select_tokens(difference.reshape(*mask.shape, -1), mask)
        total += float(difference.square().sum(dtype=torch.float64))
        elements += difference.numel()
        tokens += difference.numel() // max(difference.shape[-1], 1)
    return total, elements, tokens


def rerun(module: Any, recorded: Recorded) -> list[Any]:
    """Return the outputs of the inspected module for the recorded calls."""
    return [first_tensor(module(*args, **kwargs)) for args, kwargs in recorded.calls]


def at_least_float(weight: Any) -> Any:
    """Return weights in float32, or float64 where they are."""
    return weight if weight.dtype == torch.float64 else weight.float()


def _factor(h: Any) -> Any:
    """Return L with L L^T = H, all but 1e-10 of the mean of its diagonal.

    Products with L are then as exact in float32 as those with X, where delta H delta^T cancels.
    """
    if not bool(h.isfinite().all()):
        raise InvalidInputError("batches: an activation is not finite")
    raised = h.clone()  # channels that depend on each other make H singular
    raised.diagonal().add_(1e-10 * h.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(raised)
    if int(failed) == 0:
        return lower
    values, vectors = torch.linalg.eigh(h)
    return vectors * values.clamp(min=0).sqrt()


def linear_loss(
    weights: Sequence[Any], rounded: Callable[[Any, Any], Any], recorded: Recorded
) -> tuple[Callable[[Any], float], int]:
    """Return the mean squared output error of linears as a function of the scale of X.

    Parameters
    ----------
    weights : sequence of torch.Tensor, [N, K] each
    rounded : callable
        ``rounded(weight, scale)``: the weight a linear has in effect.
    recorded : Recorded

    Returns
    -------
    loss : callable
    elements : int
        Outputs that the mean is over.
    """
    x = recorded.rows()
    tokens, channels = x.shape
    outputs = sum(weight.shape[0] for weight in weights)
    # sum of squares of X delta^T, or of L^T delta^T with X^T X = L L^T, which has K rows and not T
    rows = _factor(gram(x)).to(x.dtype).T if tokens > channels else x

    def error(delta: Any) -> float:
        return float((rows @ delta.to(x.dtype).T).square().sum(dtype=torch.float64)) / tokens

    def loss(scale: Any) -> float:
        return sum(error(rounded(weight, scale) - weight) for weight in weights) / outputs

    return loss, tokens * outputs


def joint_outputs(
    function: Callable[..., Any] | None,
    recorded: Recorded,
    weights: Sequence[Any],
    biases: Sequence[Any],
    change: Callable[[Any], Any] = lambda x: x,
) -> list[Any]:
    """Return, for each recorded input, the function of the outputs of all linears.

    No function: the outputs side by side. `change` is applied to the inputs.
    """
    results = []
    for x, mask in zip(recorded.inputs, recorded.masks, strict=True):
        x = change(at_least_float(x))
        outputs = [
            torch.nn.functional.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))
            for w, b in zip(weights, biases, strict=True)
        ]
        results.append(torch.cat(outputs, -1) if function is None else function(outputs, mask))
    return results


@contextmanager
def with_weights(
    linears: Sequence[Any], weights: Sequence[Any], biases: Sequence[Any] | None = None
) -> Iterator[None]:
    """Let linears have other weights (and biases) for a while; without gradients."""
    old = [(linear.weight.data, linear.bias) for linear in linears]
    try:
        for number, linear in enumerate(linears):
            linear.weight.data = weights[number].to(linear.weight.dtype)
            if biases is not None:
                linear.bias = torch.nn.Parameter(
                    biases[number].to(linear.weight.dtype), requires_grad=False
                )
        yield
    finally:
        for linear, (weight, bias) in zip(linears, old, strict=True):
            linear.weight.data = weight
            linear.bias = bias


class JointAttention:
    """Softmax attention of the outputs of query, key and value projections.

    What OS+ compares for linears that feed an attention together: ``softmax(Q K^T / sqrt(d)) V``,
    before the output projection.

    Parameters
    ----------
    heads : int
    kv_heads : int, optional
        Fewer for grouped queries; head i of the keys then serves heads / kv_heads queries.
    causal : bool
    """

    def __init__(self, heads: int, kv_heads: int | None = None, causal: bool = False) -> None:
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise InvalidInputError(
                f"kv_heads: expected a divisor of heads ({heads}), got {kv_heads}"
            )
        self.heads, self.kv_heads, self.causal = heads, kv_heads, causal

    def __call__(self, outputs: Sequence[Any], mask: Any = None) -> Any:
        """Return [batch, time, heads * d] of outputs q, k, v, or of one that holds all three."""
        if len(outputs) == 1:
            both = outputs[0].shape[-1] // (self.heads + 2 * self.kv_heads)
            sizes = [self.heads * both, self.kv_heads * both, self.kv_heads * both]
            outputs = outputs[0].split(sizes, -1)
        if len(outputs) != 3:
            raise InvalidInputError(f"linears: expected query, key, value, got {len(outputs)}")
        counts = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (
            x.unflatten(-1, (count, -1)).transpose(-3, -2)
            for x, count in zip(outputs, counts, strict=True)
        )
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, -3) for x in (k, v))
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
        seen = seen.tril() if self.causal else seen
        if mask is not None:
            # a row of padding sees itself: its output is left out later, but must be a number
            own = torch.eye(q.shape[-2], dtype=torch.bool, device=q.device)
            seen = (seen & mask.to(q.device).bool()[:, None, None, :]) | own
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return out.transpose(-3, -2).flatten(-2)


class Gated:
    """``act(gate) * up`` of the outputs of a gate and an up projection, in that order.

    Parameters
    ----------
    act : callable, optional
        SiLU by default.
    """

    def __init__(self, act: Callable[[Any], Any] | None = None) -> None:
        self.act = torch.nn.functional.silu if act is None else act

    def __call__(self, outputs: Sequence[Any], mask: Any = None) -> Any:
        """Return the product; one output is cut into two halves."""
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, -1)
        return self.act(gate) * up
