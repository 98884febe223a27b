"""Quantised layers to test, and the same function in torch operations."""

from __future__ import annotations

import torch

from flcore.nn import QuantLinear

SCHEMES = (
    "int8",
    "int8-asym",
    "int4",
    "int4-asym",
    "int4-float-zero",
    "int3",
    "int2",
    "nf4",
    "fp8",
)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-12}


def layer_of(scheme="int4", n=37, k=100, rank=0, bias=True, **options) -> QuantLinear:
    layer = QuantLinear.from_linear(
        torch.nn.Linear(k, n, bias=bias), scheme, lora_rank=rank, **options
    )
    if rank:
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    return layer


def plain(layer: QuantLinear, x, dtype=torch.float64):
    """The same function in torch operations; returns y and the leaves of its graph."""
    leaves = {"x": x.detach().to(dtype).requires_grad_()}
    y = leaves["x"] @ layer.weight.dequantize("float64").to(dtype).T
    for name in ("bias", "lora_a", "lora_b"):
        value = getattr(layer, name)
        leaves[name] = None if value is None else value.detach().to(dtype).requires_grad_()
    if layer.bias is not None:
        y = y + leaves["bias"]
    if layer.lora_a is not None:
        y = y + layer.scaling * (leaves["x"] @ leaves["lora_a"].T) @ leaves["lora_b"].T
    return y, leaves


def close(got, want, dtype):
    got, want = got.detach(), want.detach()
    limit = TOLERANCE[dtype] * max(1.0, float(want.abs().max()))
    assert float((got.double() - want.double()).abs().max()) <= limit
