"""A small character-level transformer, text to train it on, and outlier channels to plant in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flcore._extras import require
from flcore.errors import InvalidInputError

__all__ = [
    "Size",
    "Text",
    "Transformer",
    "build",
    "default_text",
    "groups_of",
    "plant_outliers",
    "train",
    "windows",
]

torch: Any = require("torch", extra="train")


@dataclass(frozen=True)
class Size:
    """Dimensions of the model and of its training."""

    layers: int = 3
    width: int = 128
    heads: int = 4
    context: int = 64
    batch: int = 20
    steps: int = 1000
    lr: float = 2e-3


@dataclass(frozen=True)
class Text:
    """Characters as numbers: the first 90 % for training, the rest held out."""

    train: Any
    held: Any
    vocabulary: int

    @classmethod
    def of(cls, text: str, context: int) -> Text:
        """Number the characters of a text.

        Raises
        ------
        InvalidInputError
            The text is too short for windows of `context` characters on both sides.
        """
        letters = sorted(set(text))
        numbers = {letter: number for number, letter in enumerate(letters)}
        codes = torch.tensor([numbers[letter] for letter in text], dtype=torch.long)
        cut = len(codes) * 9 // 10
        if len(codes) - cut < 2 * (context + 1):
            raise InvalidInputError(
                f"text: expected at least {20 * (context + 1)} characters, got {len(codes)}"
            )
        return cls(codes[:cut], codes[cut:], len(letters))


def default_text(path: str | Path | None = None) -> str:
    """Return the text of a file, or the help pages that come with Python.

    Raises
    ------
    InvalidInputError
        The file cannot be read as UTF-8 text.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"text: cannot read {str(path)!r}: {error}") from None


class Attention(torch.nn.Module):
    """Causal self-attention [batch, time, width] with separate projections."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, torch.nn.Linear(size.width, size.width))

    def forward(self, x: Any) -> Any:
        """Mix tokens with those before them."""
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class Block(torch.nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.attn = torch.nn.LayerNorm(size.width), Attention(size)
        self.norm2 = torch.nn.LayerNorm(size.width)
        self.fc1, self.act = torch.nn.Linear(size.width, 4 * size.width), torch.nn.GELU()
        self.fc2 = torch.nn.Linear(4 * size.width, size.width)

    def forward(self, x: Any) -> Any:
        """Add to the residual stream."""
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Transformer(torch.nn.Module):
    """Codes of characters [batch, time] to logits [batch, time, vocabulary]."""

    def __init__(self, size: Size, vocabulary: int) -> None:
        super().__init__()
        self.token = torch.nn.Embedding(vocabulary, size.width)
        self.place = torch.nn.Embedding(size.context, size.width)
        self.blocks = torch.nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = torch.nn.LayerNorm(size.width)
        self.head = torch.nn.Linear(size.width, vocabulary)

    def forward(self, codes: Any) -> Any:
        """Return logits of the next character."""
        places = torch.arange(codes.shape[1], device=codes.device)
        return self.head(self.norm(self.blocks(self.token(codes) + self.place(places))))


def build(size: Size, vocabulary: int, seed: int) -> Any:
    """Return a pre-norm transformer with LayerNorm and GELU, biases everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(size, vocabulary)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                deep = name.endswith(("o_proj.weight", "fc2.weight"))
                torch.nn.init.normal_(parameter, std=0.02 / (size.layers**0.5 if deep else 1))
            elif name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
    return model


def windows(codes: Any, context: int, count: int, generator: Any) -> tuple[Any, Any]:
    """Return inputs and next characters, [count, context] each, at random places."""
    starts = torch.randint(len(codes) - context - 1, (count,), generator=generator)
    rows = codes[starts[:, None] + torch.arange(context + 1)]
    return rows[:, :-1], rows[:, 1:]


def train(model: Any, text: Text, size: Size, seed: int) -> None:
    """Train with AdamW, warm-up and cosine decay; the same seed gives the same model."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, betas=(0.9, 0.99))
    warm = max(1, size.steps // 15)
    model.train()
    for step in range(size.steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / size.steps))
        optimizer.param_groups[0]["lr"] = size.lr * min(1.0, (step + 1) / warm) * decay
        x, y = windows(text.train, size.context, size.batch, generator)
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def groups_of(size: Size) -> list[Any]:
    """Describe the model for `flcore.quantization.preparation`: four groups a block."""
    from flcore.quantization.preparation import JointAttention, ScalingGroup

    groups = []
    for layer in range(size.layers):
        block = f"blocks.{layer}"
        together = tuple(f"{block}.attn.{name}_proj" for name in "qkv")
        attention = JointAttention(size.heads, causal=True)
        groups += [
            ScalingGroup(f"{block}.norm1", together, inspect=attention),
            ScalingGroup(f"{block}.attn.v_proj", f"{block}.attn.o_proj", shift=True),
            ScalingGroup(f"{block}.norm2", f"{block}.fc1"),
            ScalingGroup(f"{block}.act", f"{block}.fc2"),
        ]
    return groups


def plant_outliers(
    model: Any, seed: int, share: float = 0.05, factor: float = 20.0, centre: float = 40.0
) -> None:
    """Enlarge channels behind the norms of all blocks, without changing what the model computes.

    Parameters
    ----------
    model : torch.nn.Module
        From `build`; changed in place.
    seed : int
        Chooses the channels and the signs of their centres.
    share : float
        Share of the channels behind each norm.
    factor : float
        How many times larger they get; the weights that read them get smaller.
    centre : float
        Magnitude that is added to them: channels of large models are not centred on zero either.
        The biases of the linears take it off again.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            attention = [getattr(block.attn, f"{name}_proj") for name in "qkv"]
            for norm, linears in ((block.norm1, attention), (block.norm2, [block.fc1])):
                width = norm.weight.numel()
                chosen = torch.randperm(width, generator=generator)[: round(share * width)]
                signs = 2.0 * torch.randint(2, (len(chosen),), generator=generator) - 1
                moved = signs.to(norm.weight) * centre
                norm.weight[chosen] *= factor
                norm.bias[chosen] = norm.bias[chosen] * factor + moved
                for linear in linears:
                    linear.weight[:, chosen] /= factor
                    linear.bias -= linear.weight[:, chosen] @ moved
