"""Pieces of an encoder's state: seeds, factors, bfloat16, and checks of what is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flcore import _arrays
from flcore._updates import Layout
from flcore.compression._codec import Job
from flcore.errors import DTypeError, InvalidInputError
from flcore.reference import feedback as reference
from flcore.reference import wire, wire_writer

__all__ = [
    "WORD",
    "check_layer",
    "empty_packet",
    "flat_float32",
    "mix_seed",
    "read_array",
    "read_memory",
    "read_state",
    "scale_factor",
    "to_bfloat16",
    "unflatten",
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


def empty_packet(job: Job) -> np.ndarray:
    """Return a packet that says no more than that the update was not finite."""
    header = job.header
    header["flags"] = job.flags & ~wire.FLAG_RESYNC | wire.FLAG_NONFINITE
    data = wire_writer.build(
        np.empty(0, np.int64),
        np.empty(0, np.uint32),
        numel=job.numel,
        values="float32",
        index="tile16",
        **header,
    )
    return np.frombuffer(data, np.uint8)


def unflatten(layout: Layout, targets: list[Any], flat: np.ndarray) -> Any:
    """Write `flat` (d,) into `targets`, layer after layer, and return them as an update."""
    start = 0
    for target in targets:
        size = _arrays.numel(target)
        _arrays.assign(target, flat[start : start + size])
        start += size
    return layout.build(targets)


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


def read_array(
    state: Mapping[str, Any], name: str, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    """Return an array of a state, checked; uint16 holds bfloat16."""
    array = np.asarray(state.get(name))
    if array.dtype != dtype or array.shape != shape:
        raise InvalidInputError(
            f"state[{name!r}]: expected {dtype} of shape {shape}, "
            f"got {array.dtype} of shape {array.shape}"
        )
    values = reference.from_state(array) if array.dtype == np.uint16 else array
    if not np.isfinite(values).all():
        raise InvalidInputError(f"state[{name!r}]: expected finite values")
    return array


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
        arrays[name] = read_array(own, name, x.dtype, x.shape)
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
