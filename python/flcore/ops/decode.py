"""Reading packets: checking them, adding them into accumulators, making one dense.

Stateless and with explicit buffers; :mod:`flcore.compression` has the classes on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _updates, _variants
from flcore._arrays import View
from flcore.errors import DTypeError, InvalidInputError
from flcore.reference import decode as reference
from flcore.reference import wire
from flcore.reference.wire import Header, Limits

__all__ = ["ParsedPacket", "decode", "decode_add_into", "decode_into"]

_NO_LIMITS = Limits(wire.HARD_MAX_NUMEL, 2**62, 2**32)


class ParsedPacket:
    """A packet in memory that nobody else can change.

    Parameters
    ----------
    buffer : (nbytes,) uint8 array, contiguous
        The packet; becomes read-only.
    trusted : bool
        True when our own encoder made the bytes: they are then checked at first use, not here.
    limits : Limits, optional
        What to accept.

    Raises
    ------
    PacketError
        Anything about the bytes is not as docs/packet.md says.
    """

    __slots__ = ("_buffer", "_header", "_view")

    def __init__(
        self, buffer: np.ndarray, *, trusted: bool = False, limits: Limits | None = None
    ) -> None:
        buffer.flags.writeable = False
        self._buffer = buffer
        self._header: Header | None = None
        self._view = None if trusted else _check(buffer, limits or Limits())

    @property
    def header(self) -> Header:
        """The header fields."""
        if self._header is None:
            self._header = wire.read_header(self._buffer[: wire.HEADER_BYTES].tobytes(), _NO_LIMITS)
        return self._header

    @property
    def view(self) -> Any:
        """Native view of the checked packet."""
        if self._view is None:
            self._view = _check(self._buffer, _NO_LIMITS)
        return self._view

    @property
    def k(self) -> int:
        """Number of kept entries."""
        return self.view.k

    def body(self) -> Any:
        """Return the sections as NumPy arrays, one class a kind of codec; for inspection."""
        return wire.parse(self._buffer.tobytes(), _NO_LIMITS)[1]


def _check(buffer: np.ndarray, limits: Limits) -> Any:
    return _native.core.parse_packet(
        _arrays.address(buffer),
        buffer.size,
        limits.max_numel,
        limits.max_payload_bytes,
        limits.max_tensors,
        _native.threads_for(buffer.size),
    )


def decode_add_into(
    packets: Sequence[ParsedPacket],
    weights: Sequence[float],
    out: Sequence[Any],
    *,
    variant: str | None = None,
) -> None:
    """Add ``sum_p weights[p] * D_p`` to `out`, packets in list order.

    Float32 accumulators use float32 arithmetic, ``acc + float32(w) * D``, each operation rounded,
    without fma; float64 ones the same in float64: the same bits for every variant, level and
    thread count. Packets of weight 0 are not read. Sums may overflow to infinity, as dense ones
    would. Reads the packets and the touched lines of `out` once; no packet is made dense. Codecs
    may be mixed.

    Parameters
    ----------
    packets : sequence of ParsedPacket
        All for as many coordinates as `out` holds.
    weights : numbers, one a packet
        Finite, any sign.
    out : sequence of arrays
        The layers of the accumulator, float32 or float64, writable, NumPy or torch; all on one
        device. Coordinates count through the layers in order.

    Raises
    ------
    InvalidInputError
        Counts, sizes or weights do not fit; nothing is written.
    DTypeError
        `out` has a layer of another dtype.
    """
    packets = list(packets)
    weights = _updates.parse_weights(weights, len(packets), signed=True)
    targets = [_target(x, i) for i, x in enumerate(out)]
    _check_numel(packets, targets)
    active = [(p, w) for p, w in zip(packets, weights, strict=True) if w != 0]
    function = _variants.choose("decode", _device(targets), variant)
    function([p for p, _ in active], [w for _, w in active], targets, True)
    _copy_back(out, targets)


def decode_into(packet: ParsedPacket, out: Sequence[Any], *, variant: str | None = None) -> None:
    """Write the decoded update into the layers `out`: values where kept, 0 elsewhere.

    Parameters and errors as :func:`decode_add_into`. Writes every coordinate once.
    """
    targets = [_target(x, i) for i, x in enumerate(out)]
    _check_numel([packet], targets)
    _variants.choose("decode", _device(targets), variant)([packet], [1.0], targets, False)
    _copy_back(out, targets)


def decode(packet: ParsedPacket, *, variant: str | None = None) -> np.ndarray:
    """Return the decoded update as one float32 array (numel,)."""
    out = np.empty(packet.header.numel, np.float32)
    decode_into(packet, [out], variant=variant)
    return out


def _target(x: Any, layer: int) -> View:
    """View one layer of an accumulator; what is not contiguous is copied and copied back later."""
    name = f"out[{layer}]"
    if not _arrays.is_array(x):
        raise DTypeError(
            f"{name}: expected a NumPy array or a torch tensor, got {type(x).__name__}"
        )
    if _arrays.dtype_name(x) not in ("float32", "float64"):
        raise DTypeError(f"{name}: expected float32 or float64, got {_arrays.dtype_name(x)}")
    view = _arrays.view(x, name)
    return _arrays.writable_view(x, name, like=view) or view


def _check_numel(packets: Sequence[ParsedPacket], targets: Sequence[View]) -> None:
    numel = sum(v.numel for v in targets)
    for i, p in enumerate(packets):
        if p.header.numel != numel:
            raise InvalidInputError(
                f"packets[{i}]: holds {p.header.numel} coordinates, out holds {numel}"
            )


def _device(targets: Sequence[View]) -> str:
    devices = sorted({v.device for v in targets})
    if len(devices) > 1:
        raise InvalidInputError(f"out: expected layers on one device, got {', '.join(devices)}")
    return devices[0] if devices else "cpu"


def _copy_back(out: Sequence[Any], targets: Sequence[View]) -> None:
    for x, v in zip(out, targets, strict=True):
        if v.numel and not _same_memory(x, v):
            _arrays.assign(x, v.array)


def _same_memory(x: Any, v: View) -> bool:
    return _arrays.address(x) == v.ptr


# ---- variants ----------------------------------------------------------------------------------


def _cpu(
    packets: Sequence[ParsedPacket], weights: Sequence[float], out: Sequence[View], add: bool
) -> None:
    views = [p.view for p in packets]
    work = sum(v.k for v in views) + (0 if add else sum(v.numel for v in out))
    _native.core.decode(
        packets=views,
        weights=list(weights),
        out=[v.ptr for v in out],
        numel=[v.numel for v in out],
        dtype=[v.code for v in out],
        add=add,
        threads=_native.threads_for(work),
    )


def _reference(
    packets: Sequence[ParsedPacket], weights: Sequence[float], out: Sequence[View], add: bool
) -> None:
    layers = [_flat(v) for v in out]
    parsed = [(p.header, p.body()) for p in packets]
    if add:
        reference.add(parsed, weights, layers)
        return
    dense, start = reference.dense(*parsed[0]), 0
    for layer in layers:
        layer[:] = dense[start : start + layer.size]
        start += layer.size


def _flat(v: View) -> np.ndarray:
    array = v.array if isinstance(v.array, np.ndarray) else v.array.numpy()
    return array.reshape(-1)


_variants.add("decode", "cpu", lambda: _cpu, _variants.cpu_only)
_variants.add("decode", "reference", lambda: _reference, _variants.cpu_only)
_variants.add(
    "decode", "cuda", _variants.lazy("flcore.ops._decode_cuda", "decode"), _variants.needs_cuda
)
