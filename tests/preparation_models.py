"""Small models with attention and MLP that the preparation tests describe in scaling groups."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from flcore.quantization.preparation import Gated, JointAttention, ScalingGroup

WIDTH, HEADS = 24, 4


class Attention(nn.Module):
    """Self-attention with separate projections; `mask` is False for padding."""

    def __init__(self, width: int = WIDTH, bias: bool = True) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=bias))

    def forward(self, x, mask=None):
        heads = [
            p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        ]
        seen = None if mask is None else mask[:, None, None, :]
        out = functional.scaled_dot_product_attention(*heads, attn_mask=seen)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class PreNorm(nn.Module):
    """x + attention(norm(x)), x + mlp(norm(x)) with LayerNorm and GELU."""

    def __init__(self, width: int = WIDTH, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1, self.act = nn.Linear(width, 2 * width), activation()
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x, attention_mask=None):
        x = x + self.attn(self.norm1(x), mask=attention_mask)
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class RMSNorm(nn.Module):
    """A norm without a bias, as checkpoints of LLaMA have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Llama(nn.Module):
    """RMS norms, no biases, a gated MLP."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = RMSNorm(width), Attention(width, False), RMSNorm(width)
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        h = self.norm2(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class PostNorm(nn.Module):
    """norm(x + attention(x)), whose output is read by the MLP and by the skip path."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.attn, self.norm = Attention(width), nn.LayerNorm(width)
        self.skip = nn.Identity()
        self.fc1, self.act, self.fc2 = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)

    def forward(self, x):
        h = self.norm(x + self.attn(x))
        return self.skip(h) + self.fc2(self.act(self.fc1(h)))


QKV = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
PRE_NORM = (
    ScalingGroup("norm1", QKV, inspect="attn"),
    ScalingGroup("attn.v_proj", "attn.o_proj", shift=True),
    ScalingGroup("norm2", "fc1"),
    ScalingGroup("act", "fc2"),
)
PRE_NORM_JOINT = (ScalingGroup("norm1", QKV, inspect=JointAttention(HEADS)), *PRE_NORM[1:])
LLAMA = (
    ScalingGroup("norm1", QKV, inspect=JointAttention(HEADS)),
    ScalingGroup("attn.v_proj", "attn.o_proj"),
    ScalingGroup("norm2", ("gate", "up"), inspect=Gated()),
    ScalingGroup("up", "down"),
)
POST_NORM = (ScalingGroup("norm", "fc1", residual="skip"), ScalingGroup("act", "fc2"))


def varied(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values, norms included, and outlier channels to the norms."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(1.5)
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, RMSNorm)):
                module.weight[3] *= 15
            if isinstance(module, nn.LayerNorm):
                module.bias[7] += 25
    return model.eval()


def batches(seed: int = 1, count: int = 3, width: int = WIDTH) -> list[torch.Tensor]:
    """Return inputs [4, 10, width]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 10, width, generator=generator) for _ in range(count)]
