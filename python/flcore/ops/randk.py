"""Random coordinates with feedback, from an update to a packet: checks and choice of variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _variants
from flcore._arrays import View
from flcore._state import State
from flcore.errors import InvalidInputError
from flcore.ops._encode import (
    check_header,
    device_of,
    flat_float32,
    native_source,
    nonfinite_error,
    source_dtype,
    viewed,
)
from flcore.reference import permutation, wire, wire_writer
from flcore.reference import randk as reference

__all__ = ["randk", "random_coordinates"]


def random_coordinates(
    numel: int, k: int, *, seed: int = 0, round: int = 0, variant: str | None = None
) -> np.ndarray:
    """Return k of `numel` coordinates, the same wherever seed and round are the same.

    Without replacement: the first k images below `numel` of a permutation keyed by (seed, round),
    sorted. docs/packet.md has the permutation. Memory: 10 bytes for each of min(k, numel - k),
    and 24 for each tile of 65,536 coordinates.

    Parameters
    ----------
    numel : int
        0 to 2**48.
    k : int
        0 to `numel`.
    seed, round : int
        0 to 2**64 - 1; of the round, the low 32 bits count.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    (k,) int64 array, increasing
    """
    check_header(round=round, seed=seed, epoch=0, flags=0, tensors=b"")
    for name, value, top in (("numel", numel, 2**48), ("k", k, numel)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= top:
            raise InvalidInputError(f"{name}: expected an integer from 0 to {top}, got {value!r}")
    return _variants.choose("random_coordinates", "cpu", variant)(numel, k, seed, round)


def randk(
    update: Any,
    *,
    k: int,
    scaled: bool = False,
    state: State | None = None,
    values: str = "float32",
    round: int = 0,
    seed: int = 0,
    epoch: int = 0,
    flags: int = 0,
    tensors: bytes = b"",
    variant: str | None = None,
) -> np.ndarray:
    """Encode u at the k coordinates that belong to seed and round, and move the state on.

    u is the update with what the client remembers, and D what a receiver decodes, 0 where nothing
    is sent (:class:`flcore._state.State`). The packet holds values only: who decodes it finds the
    coordinates again from its header. Packet and state are the same bits for every variant, level
    and thread count. Reads g and the states once, twice where e or v has no spare, and writes e:
    16 bytes a coordinate for EControl in float32 (12 for EF14, 4 for no feedback).

    Parameters
    ----------
    update : array, or list, tuple or dict of arrays
        g: float64, float32, float16 or bfloat16, on the CPU. Layers are read where they lie; a
        coordinate's index counts through the layers in order.
    k : int
        1 <= k <= d; 0 when there are no coordinates.
    scaled : bool
        Send ``(d / k) u``, the unbiased form: E[D] = u over seeds, variance factor
        ``omega = d / k - 1``. Otherwise u itself, which contracts with ``delta = k / d``: what
        error feedback needs.
    state : State, optional
        Memory of the client, None for none. e and v are written to their spares, else in place;
        h changes in place at the coordinates that are sent, its spare is not used.
    values : {"float32", "float16", "bfloat16", "int8"}
        Type of the values on the wire, as in :func:`flcore.ops.sparsify.sparsify`.
    round, seed, epoch, flags : int
        Header fields (docs/packet.md); FLAG_CHECKSUM is always set. Seed and the low 32 bits of
        round choose the coordinates.
    tensors : bytes
        A tensor table of `flcore.reference.wire_writer.pack_tensors`, or nothing.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    (nbytes,) uint8 array
        The packet.

    Raises
    ------
    InvalidInputError
        Sizes or options that cannot be used; nothing is written.
    DTypeError
        A layer or a state of a type that cannot be read.
    NonFiniteError
        A value of t or u is a NaN or an infinity, or one overflows when scaled; the state is as it
        was.

    References
    ----------
    Stich et al., "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599.
    """
    layout, views, numel = viewed(update)
    if isinstance(k, bool) or not isinstance(k, int) or not (numel > 0) <= k <= numel:
        raise InvalidInputError(f"k: expected an integer from {int(numel > 0)} to {numel}, got {k}")
    if values not in wire.VALUE_DTYPES:
        raise InvalidInputError(
            f"values: expected one of {', '.join(wire.VALUE_DTYPES)}, got {values!r}"
        )
    check_header(round=round, seed=seed, epoch=epoch, flags=flags, tensors=tensors)
    before = state or State()
    before.check(numel)
    inner = before.without_spare("h")
    packet = _variants.choose("randk", device_of(views), variant)(
        views,
        state=inner,
        k=k,
        scale=numel / k if scaled and k else 1.0,
        values=values,
        tensors=tensors,
        fields={
            "source_dtype": source_dtype(views),
            "round": round,
            "seed": seed,
            "epoch": epoch,
            "flags": flags,
        },
    )
    if packet is None:
        raise nonfinite_error(views, layout)
    before.take(inner)
    return packet


# ---- variants ----------------------------------------------------------------------------------


def _cpu(
    views: Sequence[View],
    *,
    state: State,
    k: int,
    scale: float,
    values: str,
    tensors: bytes,
    fields: dict[str, Any],
) -> np.ndarray | None:
    numel, rows = sum(v.numel for v in views), np.frombuffer(tensors, np.uint8)
    nbytes = wire_writer.packet_nbytes(numel, k, "seeded", values, rows.size // 64)
    out = np.empty(nbytes, np.uint8)
    written = _native.core.randk(
        **native_source(views, state),
        k=k,
        scale=scale,
        check=any(x is not None and n not in state.spare for n, x in _dense(state)),
        packet={
            **fields,
            "source_dtype": wire.SOURCE_DTYPES[fields["source_dtype"]],
            "value_dtype": wire.VALUE_DTYPES[values],
            "index": 0,
            "choice": 0,
            "tensors": _arrays.address(rows),
            "tensor_count": rows.size // 64,
            "out": _arrays.address(out),
            "capacity": nbytes,
        },
    )
    if written < 0:
        return None
    state.commit()
    return out


def _dense(state: State) -> list[tuple[str, np.ndarray | None]]:
    """States that change at every coordinate."""
    return [("e", state.e), ("v", state.v)]


def _reference(
    views: Sequence[View], *, fields: dict[str, Any], **options: Any
) -> np.ndarray | None:
    packet = reference.randk(flat_float32(views), **options, **fields)
    return None if packet is None else np.frombuffer(bytearray(packet), np.uint8)


def _cpu_coordinates(numel: int, k: int, seed: int, round: int) -> np.ndarray:
    threads = _native.threads_for(16 * min(k, numel - k))
    return _native.core.random_coordinates(numel, k, seed, round, threads)


_variants.add("randk", "cpu", lambda: _cpu, _variants.cpu_only)
_variants.add("randk", "reference", lambda: _reference, _variants.cpu_only)
_variants.add("random_coordinates", "cpu", lambda: _cpu_coordinates, _variants.cpu_only)
_variants.add(
    "random_coordinates", "reference", lambda: permutation.coordinates, _variants.cpu_only
)
