"""Quantising and dequantising the layers of an update, and the variants of the ops on words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from flcore import _arrays, _native, _variants
from flcore._arrays import View
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops._words import Mask, check_masks, check_position, finite, part, whole, words_view

__all__ = ["ROUNDING", "dequantize_layers", "quantize_layers"]

ROUNDING = ("stochastic", "nearest")
PHILOX_LENGTH = 1 << 34  # values of a stream of rounding bits, csrc/philox.h


def quantize_layers(
    layers: Sequence[View],
    words: Any,
    *,
    scale: float,
    clip: float,
    levels: int,
    rounding: str,
    stream: tuple[int | None, int, int],
    masks: Sequence[Mask],
    position: int,
    bits: int,
    first_tensor: int = 0,
    offset: int = 0,
    target: Any = None,
    names: Sequence[str] = ("x",),
    variant: str | None,
) -> int:
    """Quantise layers one after the other into `words`, a buffer nobody else holds yet.

    The words are copied into `target` at the end, if there is one. `stream` is (seed, round,
    client), the layer's number is the tensor. Returns how many values were clipped.
    """
    bits = whole("bits", bits, 1, 32)
    levels = whole("levels", levels, 1, (1 << bits) - 1)
    scale, clip = finite("scale", scale), finite("clip", clip, low=0.0)
    tensor = whole("tensor", first_tensor, 0, (1 << 32) - len(layers))
    offset = whole("offset", offset, 0, PHILOX_LENGTH)
    if rounding not in ROUNDING:
        raise InvalidInputError(f"rounding: expected one of {ROUNDING}, got {rounding!r}")
    seed, round, client = stream
    if rounding == "stochastic":
        if seed is None:
            raise InvalidInputError("seed: stochastic rounding needs one, below 2^64")
        seed = whole("seed", seed, 0, (1 << 64) - 1)
        round = whole("round", round, 0, (1 << 32) - 1)
        client = whole("client", client, 0, (1 << 32) - 1)
        if (longest := max((v.numel for v in layers), default=0)) + offset > PHILOX_LENGTH:
            raise InvalidInputError(
                f"offset: a stream has 2^34 values, expected offset + numel within it, "
                f"got {offset} + {longest}"
            )
    steps_per_unit = _ratio(levels, 2.0 * clip)
    masks = check_masks(masks)
    buffer = words_view(words, "words", writable=True)
    position = check_position(position, buffer.numel)
    if target is not None:
        words_view(target, "out", writable=True, like=buffer)
    function = _variants.choose("mask_quantize", buffer.device, variant)
    clipped = start = 0
    for i, layer in enumerate(layers):
        found = function(
            layer,
            part(buffer, start, layer.numel),
            scale=scale,
            clip=clip,
            levels=levels,
            steps_per_unit=steps_per_unit,
            stream=(seed, round, tensor + i, client) if rounding == "stochastic" else None,
            element=offset,
            masks=masks,
            position=position + start,
            bits=bits,
        )
        if found < 0:
            raise NonFiniteError(f"{names[i]}: NaN or infinity found; it cannot be quantised")
        clipped += found
        start += layer.numel
    if target is not None:
        _arrays.assign(target, words)
    return clipped


def dequantize_layers(
    words: View,
    layers: Sequence[View],
    clients: int,
    *,
    clip: float,
    levels: int,
    divisor: float,
    bits: int,
    variant: str | None,
) -> None:
    """Write the sum of `clients` values into layers that nobody else holds yet."""
    bits = whole("bits", bits, 1, 32)
    levels = whole("levels", levels, 1, (1 << bits) - 1)
    clients = whole("clients", clients, 1, (1 << bits) // levels)
    factor = _ratio(finite("clip", clip, low=0.0), levels * finite("divisor", divisor, low=0.0))
    function = _variants.choose("dequantize_sum", words.device, variant)
    above = start = 0
    for layer in layers:
        piece = part(words, start, layer.numel)
        above += function(piece, layer, top=clients * levels, factor=factor)
        start += layer.numel
    if above:
        raise InvalidInputError(
            f"words: {above} of {words.numel} are above clients * levels = {clients * levels}: "
            "masks that were not removed, or a client that sent words no encoder makes"
        )


def _ratio(a: float, b: float) -> float:
    """Return a / b, or an error when the grid cannot be expressed in float64."""
    if b and math.isfinite(b) and 0 < a / b < math.inf:
        return a / b
    raise InvalidInputError(f"clip: the step between levels is out of range: {a!r} / {b!r}")


# ---- variants ----------------------------------------------------------------------------------


def _secrets(masks: Sequence[Mask]) -> tuple[bytes, list[bool]]:
    return b"".join(m.key + m.nonce for m in masks), [m.sign < 0 for m in masks]


def _threads(numel: int, masks: Sequence[Mask]) -> int:
    return _native.threads_for(numel * (2 + 4 * len(masks)))  # a keystream takes about 1 ns a word


def _quantize_cpu(
    x: View,
    out: View,
    *,
    scale: float,
    clip: float,
    levels: int,
    steps_per_unit: float,
    stream: tuple[int, int, int, int] | None,
    element: int,
    masks: Sequence[Mask],
    position: int,
    bits: int,
) -> int:
    """csrc/cpu/mask.isa.cpp; `stream` is (seed, round, tensor, client), None rounds to nearest."""
    return _native.core.mask_quantize(
        x.ptr,
        x.code,
        x.numel,
        out.ptr,
        scale,
        clip,
        levels,
        steps_per_unit,
        stream is not None,
        *(stream or (0, 0, 0, 0)),
        element,
        *_secrets(masks),
        position,
        bits,
        _threads(x.numel, masks),
    )


def _add_cpu(words: View, out: View, *, masks: Sequence[Mask], position: int, bits: int) -> None:
    threads = _threads(words.numel, masks)
    _native.core.mask_add(
        words.ptr, out.ptr, words.numel, *_secrets(masks), position, bits, threads
    )


def _sum_cpu(rows: Sequence[View], acc: View, *, fresh: bool, bits: int) -> None:
    threads = _native.threads_for(acc.numel * (len(rows) + 1))
    _native.core.mask_sum([r.ptr for r in rows], acc.ptr, acc.numel, fresh, bits, threads)


def _dequantize_cpu(words: View, out: View, *, top: int, factor: float) -> int:
    threads = _native.threads_for(words.numel)
    return _native.core.mask_dequantize(
        words.ptr, out.ptr, words.numel, out.code, top, factor, threads
    )


for _op, _cpu, _reference in (
    ("mask_quantize", "_quantize_cpu", "quantize"),
    ("mask_add", "_add_cpu", "add"),
    ("modular_sum", "_sum_cpu", "modular_sum"),
    ("dequantize_sum", "_dequantize_cpu", "dequantize_sum"),
):
    _variants.add(_op, "cpu", _variants.lazy(__name__, _cpu), _variants.cpu_only)
    _variants.add(
        _op, "reference", _variants.lazy("flcore.reference.mask", _reference), _variants.cpu_only
    )
