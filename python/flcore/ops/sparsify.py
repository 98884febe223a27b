"""Exact top-k with feedback, from an update to a packet: validation and choice of variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _updates, _variants
from flcore._arrays import View
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.reference import sparsify as reference
from flcore.reference import wire, wire_writer

__all__ = ["sparsify"]


def sparsify(
    update: Any,
    *,
    k: int,
    e: np.ndarray | None = None,
    h: np.ndarray | None = None,
    a: float = 1.0,
    b: float = 1.0,
    values: str = "float32",
    index: str = "tile16",
    round: int = 0,
    seed: int = 0,
    epoch: int = 0,
    flags: int = 0,
    tensors: bytes = b"",
    variant: str | None = None,
) -> np.ndarray:
    """Select the k largest entries of ``u = (a e + g) - h``, encode them, update e and h.

    With ``t = (b e + g) - h`` and D what a receiver decodes (0 where nothing is sent)::

        e <- t - D,   h <- h + D

    EControl is ``a=eta, b=1`` with e and h; error feedback (EF14) is ``a=b=decay`` with e alone;
    EF21 is h alone; plain top-k has neither. Everything is float32, in the order written, without
    fma. Exactly k entries: larger ``|u|`` first, then the smaller index; indices in the packet
    increase. Packet and state are the same bits for every variant, level and thread count.

    Reads g, e, h twice and writes e once: 28 bytes a coordinate for EControl in float32 (20 for
    EF14, 8 for plain top-k), more passes only when more than 2 k + 4096 keys share the 11 leading
    bits with the k-th.

    Parameters
    ----------
    update : array, or list, tuple or dict of arrays
        g: float64, float32, float16 or bfloat16, on the CPU. Layers are read where they lie; a
        coordinate's index counts through the layers in order.
    k : int
        1 <= k <= d; 0 when the update is empty.
    e, h : (d,) float32 arrays, optional
        State, updated in place. Contiguous and writable; must not overlap each other or `update`.
    a, b : float
        Factors of e, rounded to float32.
    values : {"float32", "float16", "bfloat16"}
        Type of the values on the wire: nearest even; a finite value too large for the type becomes
        the largest finite one.
    index : {"tile16", "bitmask"}
        Two bytes an entry, or one bit a coordinate.
    round, seed, epoch, flags : int
        Header fields (docs/packet.md); FLAG_CHECKSUM is always set.
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
        A value of t or u is a NaN or an infinity; nothing is written.

    References
    ----------
    Gao, Islamov, Stich, "EControl", ICLR 2024, arXiv 2311.05645. Stich et al., "Sparsified SGD with
    Memory", NeurIPS 2018, arXiv 1809.07599.
    """
    layout, layers = _updates.flatten(update)
    views = layout.views(layers, "update")
    numel = sum(v.numel for v in views)
    if isinstance(k, bool) or not isinstance(k, int) or not (numel > 0) <= k <= numel:
        raise InvalidInputError(f"k: expected an integer from {int(numel > 0)} to {numel}, got {k}")
    for name, value, known in (
        ("values", values, wire.VALUE_DTYPES),
        ("index", index, wire.INDEX_CODINGS),
    ):
        if value not in known:
            raise InvalidInputError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    for name, number, bits in (
        ("round", round, 64),
        ("seed", seed, 64),
        ("epoch", epoch, 32),
        ("flags", flags, 32),
    ):
        if not 0 <= number < 2**bits:
            raise InvalidInputError(f"{name}: expected 0 <= {name} < 2**{bits}, got {number}")
    if len(tensors) % 64:
        raise InvalidInputError(f"tensors: expected a multiple of 64 bytes, got {len(tensors)}")
    _check_state(e, "e", numel)
    _check_state(h, "h", numel)
    if e is not None and h is not None and np.may_share_memory(e, h):
        raise InvalidInputError("e and h: expected two arrays that do not overlap")
    devices = {v.device for v in views}
    device = next((d for d in devices if d != "cpu"), "cpu")
    fields = {
        "source_dtype": _source_dtype(views),
        "round": round,
        "seed": seed,
        "epoch": epoch,
        "flags": flags,
    }
    packet = _variants.choose("sparsify", device, variant)(
        views, k=k, e=e, h=h, a=a, b=b, values=values, index=index, tensors=tensors, fields=fields
    )
    if packet is None:
        raise NonFiniteError(_find_nonfinite(views, layout))
    return packet


def _check_state(x: np.ndarray | None, name: str, numel: int) -> None:
    if x is None:
        return
    if not isinstance(x, np.ndarray) or x.dtype != np.float32 or not x.dtype.isnative:
        got = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise DTypeError(f"{name}: expected a float32 NumPy array, got {got}")
    if x.shape != (numel,):
        raise InvalidInputError(f"{name}: expected shape ({numel},), got {x.shape}")
    if not (x.flags.c_contiguous and x.flags.aligned and x.flags.writeable):
        raise InvalidInputError(f"{name}: expected a contiguous, aligned, writable array")


def _source_dtype(views: Sequence[View]) -> str:
    """Return what the header says: the common dtype, else float64 if any layer is, else float32."""
    kinds = {v.dtype for v in views}
    if len(kinds) == 1:
        return kinds.pop()
    return "float64" if "float64" in kinds else "float32"


def _find_nonfinite(views: Sequence[View], layout: _updates.Layout) -> str:
    """Word where the first NaN or infinity is; the slow way, for the error message."""
    for i, v in enumerate(views):
        g = _float32(v)
        if not np.isfinite(g).all():
            at = int(np.flatnonzero(~np.isfinite(g))[0])
            return (
                f"{layout.label('update', i)}: expected finite float32 values, "
                f"got {g[at]} at flat position {at}; nothing was encoded and no state changed"
            )
    return (
        "update: finite, but with the state e and h it overflows float32; nothing was encoded "
        "and no state changed"
    )


def _float32(v: View) -> np.ndarray:
    with np.errstate(over="ignore"):
        return _arrays.to_float64(v.array).astype(np.float32)


# ---- variants ----------------------------------------------------------------------------------


def _address(x: np.ndarray | None) -> int:
    return _arrays.address(x) if x is not None else 0


def _cpu(
    views: Sequence[View],
    *,
    k: int,
    e: np.ndarray | None,
    h: np.ndarray | None,
    a: float,
    b: float,
    values: str,
    index: str,
    tensors: bytes,
    fields: dict[str, Any],
) -> np.ndarray | None:
    numel = sum(v.numel for v in views)
    rows = np.frombuffer(tensors, np.uint8)
    out = np.empty(wire_writer.packet_nbytes(numel, k, index, values, len(tensors) // 64), np.uint8)
    finite = _native.core.sparsify(
        layers=[v.ptr for v in views],
        numel=[v.numel for v in views],
        dtype=[v.code for v in views],
        e=_address(e),
        h=_address(h),
        a=a,
        b=b,
        k=k,
        source_dtype=wire.SOURCE_DTYPES[fields["source_dtype"]],
        value_dtype=wire.VALUE_DTYPES[values],
        index=wire.INDEX_CODINGS[index],
        flags=fields["flags"],
        round=fields["round"],
        seed=fields["seed"],
        epoch=fields["epoch"],
        tensors=_address(rows),
        tensor_count=rows.size // 64,
        out=_address(out),
        out_bytes=out.size,
        threads=_native.threads_for(numel),
    )
    return out if finite else None


def _reference(
    views: Sequence[View], *, fields: dict[str, Any], **options: Any
) -> np.ndarray | None:
    g = np.concatenate([_float32(v) for v in views]) if views else np.empty(0, np.float32)
    packet = reference.sparsify(g, **options, **fields)
    return None if packet is None else np.frombuffer(bytearray(packet), np.uint8)


_variants.add("sparsify", "cpu", lambda: _cpu, _variants.cpu_only)
_variants.add("sparsify", "reference", lambda: _reference, _variants.cpu_only)
