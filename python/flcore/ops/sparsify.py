"""Exact top-k with feedback, from an update to a packet: validation and choice of variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _variants
from flcore._arrays import View
from flcore._state import State
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops._encode import (
    check_header,
    flat_float32,
    native_source,
    nonfinite_error,
    source_dtype,
    viewed,
)
from flcore.reference import sparsify as reference
from flcore.reference import wire, wire_writer

__all__ = ["sparsify"]

SLACK = 0.9
"""Part of the last threshold that candidates must reach: 1.6 to 1.8 k of them on drifting data."""


def sparsify(
    update: Any,
    *,
    k: int | np.ndarray,
    segments: np.ndarray | None = None,
    floor: float = 0.0,
    rank: int = 0,
    tau: np.ndarray | None = None,
    slack: float = SLACK,
    state: State | None = None,
    values: str = "float32",
    index: str = "tile16",
    round: int = 0,
    seed: int = 0,
    epoch: int = 0,
    flags: int = 0,
    tensors: bytes = b"",
    variant: str | None = None,
) -> np.ndarray:
    """Select the k entries of largest magnitude, encode them, move the state on.

    u is the update with what the client remembers, and D what a receiver decodes, 0 where nothing
    is sent (:class:`flcore._state.State`). Exactly k entries: larger ``|u|`` first, then the
    smaller index; indices in the packet increase. Packet and state are the same bits for every
    variant, level and thread count.

    In place, two passes: g, e, h are read twice and e is written once, 28 bytes a coordinate for
    EControl in float32 (20 for EF14, 8 for plain top-k). With spares for e and v one pass, with a
    threshold guessed from `tau` or, where there is none, from a sample: 16 (12, 4). If fewer than k
    entries reach `slack` times the guess, or more than 4 k and an eighth of all, the two passes
    follow: the result is the same. A pass more when over 2 k + 4096 keys share the 11 leading bits
    with the k-th. Segments of at most 65,536 coordinates are selected in cache, in one pass.

    Parameters
    ----------
    update : array, or list, tuple or dict of arrays
        g: float64, float32, float16 or bfloat16, on one device, where e, h, v are too; the packet
        is in CPU memory. Layers are read where they lie; a coordinate's index counts through the
        layers in order.
    k : int or (segments,) int64 array
        1 <= k <= d, in each segment; 0 when there are no coordinates.
    segments : (segments + 1,) int64 array, optional
        First coordinate of each segment, then d; each is selected by itself. One segment otherwise.
    floor : float
        Entries with ``|u|`` below it are not sent, even when fewer than k remain. One segment only.
    rank : int
        Which entry's magnitude `tau` receives, at most k; 0: the k-th. One segment only.
    tau : (segments,) uint32 array, optional
        Thresholds of the last call as ``bits(|u|)`` of the k-th entry, 0 where there was none: a
        guess that saves a pass. Receives those of this call, 0 where they lie below the floor.
    slack : float
        Part of tau that candidates must reach, >= 0.
    state : State, optional
        Memory of the client, None for none. e and v are written to their spares, else in place;
        h changes in place at the entries that are sent, its spare is not used.
    values : {"float32", "float16", "bfloat16", "int8"}
        Type of the values on the wire: nearest even; a finite value too large for the type becomes
        the largest finite one. int8 has a float32 scale for each tile of 65,536 coordinates, a
        127th of the largest magnitude that is sent of it.
    index : {"tile16", "bitmask", "bitpack", "rice", "auto", "smallest"}
        Two bytes an entry; one bit a coordinate; gaps between entries, packed or Rice-coded
        (:func:`flcore.ops.indices.encode_indices`). Auto: the first or the second, whichever takes
        fewer bytes; smallest: whichever of all four does.
    round, seed, epoch, flags : int
        Header fields (docs/packet.md); FLAG_CHECKSUM is always set.
    tensors : bytes
        A tensor table of `flcore.reference.wire_writer.pack_tensors`, or nothing.
    variant : {"reference", "cpu", "cuda"}, optional
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
        A value of t or u is a NaN or an infinity; the state is as it was.

    References
    ----------
    Gao, Islamov, Stich, "EControl", ICLR 2024, arXiv 2311.05645. Stich et al., "Sparsified SGD with
    Memory", NeurIPS 2018, arXiv 1809.07599. Carried threshold and radix select after "Parallel
    Top-K Algorithms on GPU", SC 2023, doi 10.1145/3581784.3607062.
    """
    layout, views, numel = viewed(update)
    starts, counts = _check_segments(k, segments, numel)
    for name, value, known in (
        ("values", values, wire.VALUE_DTYPES),
        ("index", index, (*_CHOICES, *wire.INDEX_CODINGS)),
    ):
        if value not in known:
            raise InvalidInputError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    check_header(round=round, seed=seed, epoch=epoch, flags=flags, tensors=tensors)
    if not (0 <= floor <= _LARGEST and 0 <= slack <= _LARGEST):
        raise InvalidInputError(
            f"floor, slack: expected finite numbers >= 0, got {floor!r} and {slack!r}"
        )
    if counts.size != 1 and (floor or rank):
        raise InvalidInputError(f"floor, rank: expected one segment, got {counts.size}")
    if not 0 <= rank <= int(counts.sum()):
        raise InvalidInputError(f"rank: expected 0 to k, got {rank}")
    _check_tau(tau, counts.size)
    devices = sorted({v.device for v in views if v.numel})
    if len(devices) > 1:
        raise InvalidInputError(f"update: expected layers on one device, got {', '.join(devices)}")
    device = devices[0] if devices else "cpu"
    before = state or State()
    before.check(numel, device)
    inner = before.without_spare("h")
    fields = {
        "source_dtype": source_dtype(views),
        "round": round,
        "seed": seed,
        "epoch": epoch,
        "flags": flags,
    }
    packet = _variants.choose("sparsify", device, variant)(
        views,
        state=inner,
        starts=starts,
        k=counts,
        floor=int(reference.keys(np.array([floor], np.float32))[0]),
        rank=rank,
        tau=tau,
        slack=slack,
        values=values,
        index=index,
        tensors=tensors,
        fields=fields,
    )
    if packet is None:
        raise nonfinite_error(views, layout)
    before.take(inner)
    return packet


_CHOICES = {"auto": 1, "smallest": 2}  # IndexChoice in csrc/sparse_emit.h
_LARGEST = float(np.finfo(np.float32).max)


def _check_segments(
    k: Any, segments: np.ndarray | None, numel: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return first coordinates and counts of the segments as int64 arrays."""
    if segments is None:
        if isinstance(k, bool) or not isinstance(k, int) or not (numel > 0) <= k <= numel:
            raise InvalidInputError(
                f"k: expected an integer from {int(numel > 0)} to {numel}, got {k}"
            )
        return np.array([0, numel], np.int64), np.array([k], np.int64)
    for name, x in (("segments", segments), ("k", k)):
        if not isinstance(x, np.ndarray) or x.dtype != np.int64 or x.ndim != 1:
            got = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
            raise DTypeError(f"{name}: expected a 1-D int64 array, got {got}")
    starts, counts = np.ascontiguousarray(segments), np.ascontiguousarray(k)
    if starts.size != counts.size + 1:
        raise InvalidInputError(f"k: expected {starts.size - 1} counts, got {counts.size}")
    length = np.diff(starts)
    if starts[0] != 0 or starts[-1] != numel or (length < 0).any():
        raise InvalidInputError(f"segments: expected coordinates that rise from 0 to {numel}")
    wrong = np.flatnonzero((counts < (length > 0)) | (counts > length))
    if wrong.size:
        s = wrong[0]
        raise InvalidInputError(
            f"k[{s}]: expected {int(length[s] > 0)} to {length[s]}, got {counts[s]}"
        )
    return starts, counts


def _check_tau(tau: np.ndarray | None, segments: int) -> None:
    if tau is None:
        return
    if not isinstance(tau, np.ndarray) or tau.dtype != np.uint32:
        got = tau.dtype if isinstance(tau, np.ndarray) else type(tau).__name__
        raise DTypeError(f"tau: expected a uint32 array, got {got}")
    if tau.shape != (segments,) or not (tau.flags.c_contiguous and tau.flags.writeable):
        raise InvalidInputError(
            f"tau: expected a contiguous, writable array of shape ({segments},), got {tau.shape}"
        )


# ---- variants ----------------------------------------------------------------------------------


def packet_fields(
    fields: dict[str, Any], values: str, index: str, tensors: np.ndarray, out: np.ndarray
) -> dict[str, Any]:
    """Return what the native code wants to know of a packet; `tensors`: its table as uint8."""
    return {
        **fields,
        "source_dtype": wire.SOURCE_DTYPES[fields["source_dtype"]],
        "value_dtype": wire.VALUE_DTYPES[values],
        "index": wire.INDEX_CODINGS.get(index, 0),
        "choice": _CHOICES.get(index, 0),
        "tensors": _arrays.address(tensors),
        "tensor_count": tensors.size // 64,
        "out": _arrays.address(out),
        "capacity": out.size,
    }


def _cpu(
    views: Sequence[View],
    *,
    state: State,
    starts: np.ndarray,
    k: np.ndarray,
    floor: int,
    rank: int,
    tau: np.ndarray | None,
    slack: float,
    values: str,
    index: str,
    tensors: bytes,
    fields: dict[str, Any],
) -> np.ndarray | None:
    numel, rows = int(starts[-1]), np.frombuffer(tensors, np.uint8)
    capacity = wire_writer.packet_nbytes(numel, int(k.sum()), index, values, len(tensors) // 64)
    out = np.empty(capacity, np.uint8)
    nbytes = _native.core.sparsify(
        **native_source(views, state),
        segments=k.size,
        starts=_arrays.address(starts),
        k=_arrays.address(k),
        floor=floor,
        rank=rank,
        slack=slack,
        tau=_arrays.address(tau) if tau is not None else 0,
        packet=packet_fields(fields, values, index, rows, out),
    )
    if nbytes < 0:
        return None
    state.commit()
    return out if nbytes == capacity else out[:nbytes].copy()


def _reference(
    views: Sequence[View],
    *,
    state: State,
    slack: float,
    fields: dict[str, Any],
    **options: Any,
) -> np.ndarray | None:
    packet = reference.sparsify(flat_float32(views), state=state, **options, **fields)
    return None if packet is None else np.frombuffer(bytearray(packet), np.uint8)


_variants.add("sparsify", "cpu", lambda: _cpu, _variants.cpu_only)
_variants.add("sparsify", "reference", lambda: _reference, _variants.cpu_only)
_variants.add(
    "sparsify",
    "cuda",
    _variants.lazy("flcore.ops._sparsify_cuda", "sparsify"),
    _variants.needs_cuda,
)
