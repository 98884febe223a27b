"""What users run today for low-bit codes with error feedback and for summing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore.bench.cases import Setup
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["dequantise_add_peers", "ef14_peers"]

Pair = tuple[Any, Any]  # packed codes and scales


def _unpacked(pair: Pair, levels: int, bucket: int) -> np.ndarray:
    """Return the dense message of packed codes and scales."""
    packed, scale = (np.asarray(x) for x in pair)
    if levels == 127:
        q = packed.astype(np.float32)
    elif levels == 7:
        codes = np.stack([packed & 15, packed >> 4], 1).reshape(-1)
        q = codes.astype(np.float32) - 7
    else:
        q = 1 - 2 * np.unpackbits(packed, bitorder="little").astype(np.float32)
    return (q.reshape(-1, bucket) * scale).reshape(-1)


def ef14_peers(
    gradients: list[np.ndarray], levels: int, bucket: int, setup: Setup
) -> tuple[list[Contestant], dict[str, str]]:
    """EF14 as a chain of library calls; each peer keeps its own memory e.

    levels: 127 or 7 for rounding to -levels .. levels, 0 for signs. The length is a multiple of the
    bucket, and of 8.
    """
    eager, compiled = "torch chain", "torch.compile of the chain"
    contestants = [_numpy_ef14(gradients, levels, bucket)]
    absent: dict[str, str] = {}
    torch, reason = optional("torch")
    if torch is None:
        return contestants, dict.fromkeys((eager, compiled), reason)
    contestants.append(_torch_ef14(torch, gradients, levels, bucket, eager, lambda step: step))
    if setup.compiled:
        contestants.append(_torch_ef14(torch, gradients, levels, bucket, compiled, torch.compile))
    else:
        absent[compiled] = "left out on request"
    return contestants, absent


def _numpy_ef14(gradients: list[np.ndarray], levels: int, bucket: int) -> Contestant:
    e = np.zeros(gradients[0].size, np.float32)

    def step(slot: int) -> Pair:
        u = (e + gradients[slot]).reshape(-1, bucket)
        if levels:
            scale = np.abs(u).max(1, keepdims=True) / np.float32(levels)
            q = np.clip(np.rint(u / scale), -levels, levels)
            decoded = q * scale
            if levels == 127:
                packed = q.astype(np.int8).reshape(-1)
            else:
                codes = (q + levels).astype(np.uint8).reshape(-1)
                packed = codes[0::2] | codes[1::2] << 4
        else:
            scale = np.abs(u).mean(1, keepdims=True)
            negative = u < 0
            packed = np.packbits(negative.reshape(-1), bitorder="little")
            decoded = np.where(negative, -scale, scale)
        np.subtract(u, decoded, out=e.reshape(-1, bucket))
        return packed, scale

    return Contestant(
        "numpy chain", step, lambda pair: _unpacked(pair, levels, bucket), lambda: e.fill(0)
    )


def _torch_ef14(
    torch: Any, gradients: list[np.ndarray], levels: int, bucket: int, name: str, wrap: Any
) -> Contestant:
    inputs = [torch.from_numpy(g) for g in gradients]
    e = torch.zeros(gradients[0].size)
    bit = 1 << torch.arange(8, dtype=torch.uint8)

    def rounded(g: Any, memory: Any) -> Pair:
        u = (memory + g).view(-1, bucket)
        scale = u.abs().amax(1, keepdim=True) / levels
        q = torch.round(u / scale).clamp(-levels, levels)
        if levels == 127:
            packed = q.to(torch.int8).view(-1)
        else:
            codes = (q + levels).to(torch.uint8).view(-1)
            packed = codes[0::2] | codes[1::2] << 4
        memory.copy_((u - q * scale).view(-1))
        return packed, scale

    def signs(g: Any, memory: Any) -> Pair:
        u = (memory + g).view(-1, bucket)
        scale = u.abs().mean(1, keepdim=True)
        negative = u < 0
        packed = (negative.view(-1, 8).to(torch.uint8) * bit).sum(1, dtype=torch.uint8)
        memory.copy_((u - torch.where(negative, -scale, scale)).view(-1))
        return packed, scale

    run = wrap(rounded if levels else signs)
    return Contestant(
        name,
        lambda slot: run(inputs[slot], e),
        lambda pair: _unpacked(pair, levels, bucket),
        lambda: e.zero_(),
    )


def dequantise_add_peers(
    packets: Sequence[Any], weights: np.ndarray, bucket: int, setup: Setup
) -> tuple[list[Contestant], dict[str, str]]:
    """Sum of 8-bit updates: every one made dense and added, from codes and scales as arrays."""
    pairs = []
    for packet in packets:
        body = packet.body()
        q = (body.codes.astype(np.int16) - 127).astype(np.int8).reshape(-1, bucket)
        pairs.append((q, body.scales.copy()))
    numel = pairs[0][0].size
    total = np.zeros((numel // bucket, bucket), np.float32)

    def add_numpy(slot: int) -> np.ndarray:
        for (q, scale), weight in zip(pairs, weights, strict=True):
            np.add(total, weight * (q * scale), out=total)
        return total.reshape(-1)

    contestants = [Contestant("numpy dequantise and add", add_numpy, reset=lambda: total.fill(0))]
    names = "torch dequantise and add", "torch.compile of it"
    torch, reason = optional("torch")
    if torch is None:
        return contestants, dict.fromkeys(names, reason)
    tensors = [(torch.from_numpy(q), torch.from_numpy(scale)) for q, scale in pairs]
    factors = weights.tolist()
    sums = torch.zeros(numel // bucket, bucket)

    def step(q: Any, scale: Any, factor: Any, out: Any) -> None:
        out.add_(q.to(torch.float32) * scale, alpha=factor)

    def contestant(name: str, one: Any, factors: list[Any]) -> Contestant:
        def add(slot: int) -> Any:
            for (q, scale), factor in zip(tensors, factors, strict=True):
                one(q, scale, factor, sums)
            return sums.view(-1)

        return Contestant(name, add, reset=lambda: sums.zero_())

    contestants.append(contestant(names[0], step, factors))
    if not setup.compiled:
        return contestants, {names[1]: "left out on request"}

    def fused(q: Any, scale: Any, factor: Any, out: Any) -> None:
        out.add_(q.to(torch.float32) * scale * factor)

    as_tensors = [torch.tensor(w) for w in factors]  # a Python number would compile 32 times
    contestants.append(contestant(names[1], torch.compile(fused), as_tensors))
    return contestants, {}
