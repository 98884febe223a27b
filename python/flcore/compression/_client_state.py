"""Pieces of an encoder's state: seeds, factors, bfloat16, and checks of what is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flcore import _arrays
from flcore.errors import DTypeError, InvalidInputError
from flcore.reference import feedback as reference

__all__ = [
    "WORD",
    "check_layer",
    "flat_float32",
    "mix_seed",
    "read_memory",
    "read_state",
    "scale_factor",
    "to_bfloat16",
]

WORD = 2**64 - 1
"""The largest seed, round and client."""


def mix_seed(seed: int, client: int) -> int:
    """Return the number `client` of the SplitMix64 sequence that starts at `seed`, 64 bits.

    Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    z = (seed + (client + 1) * 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def scale_factor(factor: float) -> np.float32:
    """Return a factor of :meth:`Encoder.rescale` as float32, or raise `InvalidInputError`."""
    number = isinstance(factor, int | float | np.number) and not isinstance(factor, bool)
    scale = np.float32(factor) if number else np.float32(0)
    if not (math.isfinite(scale) and scale > 0):
        raise InvalidInputError(f"factor: expected a positive finite number, got {factor!r}")
    return scale


def flat_float32(layers: list[Any]) -> np.ndarray:
    """Return layers one after another, rounded to float32."""
    with np.errstate(over="ignore"):
        parts = [_arrays.to_float64(x).astype(np.float32) for x in layers]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Return the bits of the nearest bfloat16 numbers; ties to even, the largest stay finite."""
    bits = x.view(np.uint32)
    raw = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(raw & 0x7FFF == 0x7F80, raw - 1, raw).astype(np.uint16)


def check_layer(x: Any, label: str) -> None:
    if not _arrays.is_float(x):
        raise DTypeError(
            f"{label}: expected {_arrays.FLOATS}, got {_arrays.dtype_name(x)}; "
            "leave integer buffers out of a compressed update"
        )
    if _arrays.device_of(x) != "cpu":
        raise DTypeError(f"{label}: expected an array on the CPU, got {_arrays.device_of(x)}")


def read_state(
    state: Mapping[str, Any], plain: Mapping[str, Any], kept: Mapping[str, np.ndarray]
) -> tuple[int, dict[str, np.ndarray]]:
    """Return epoch and arrays of a state, checked against an encoder's plain values and buffers."""
    own = {k: v for k, v in state.items() if not k.startswith("codec.")}
    expected = sorted([*plain, *kept])
    if sorted(own) != expected:
        raise InvalidInputError(f"state: expected the keys {expected}, got {sorted(own)}")
    for name in ("feedback", "numel"):
        if own[name] != plain[name]:
            raise InvalidInputError(f"state[{name!r}]: expected {plain[name]!r}, got {own[name]!r}")
    epoch = int(own["epoch"])
    if not 0 <= epoch < 2**32:
        raise InvalidInputError(f"state['epoch']: expected 0 to 2**32 - 1, got {epoch}")
    arrays = {}
    for name, x in kept.items():
        array = np.asarray(own[name])
        if array.dtype != x.dtype or array.shape != x.shape:
            raise InvalidInputError(
                f"state[{name!r}]: expected {x.dtype} of shape {x.shape}, "
                f"got {array.dtype} of shape {array.shape}"
            )
        if not np.isfinite(reference.from_state(array)).all():
            raise InvalidInputError(f"state[{name!r}]: expected finite values")
        arrays[name] = array
    return epoch, arrays


def read_memory(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what codecs remember, copied from the entries ``codec.<codec>.<name>`` of a state."""
    memory: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        if not key.startswith("codec."):
            continue
        codec, _, name = key.removeprefix("codec.").partition(".")
        if isinstance(value, np.ndarray):
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise InvalidInputError(f"state[{key!r}]: expected finite values")
            value = value.copy()
        memory.setdefault(codec, {})[name] = value
    return memory
