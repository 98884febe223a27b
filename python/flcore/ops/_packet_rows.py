"""Packets in the place of client updates, for the ops that read many updates at once.

A kernel decodes a tile of all packets into cache and works on its rows; no packet is made dense.
What packets decode to are finite float32 values, so that nothing is looked for here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _updates
from flcore._arrays import View
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops.decode import ParsedPacket, decode_into
from flcore.reference import wire_frame as wire

__all__ = ["PacketRows", "by_reference", "holds_packets", "packet_rows", "sign_packet"]

Bytes = bytes | bytearray | memoryview


class PacketRows:
    """n packets that stand for n updates of float32.

    Attributes
    ----------
    packets : list of ParsedPacket
    layout : Layout
        Structure, shapes, dtypes and device of a result.
    arrays : list of arrays
        The layers of an update of that layout; only looked at for what the layout says.
    layers : list of View
        The layers of the rows: float32, without an address.
    """

    __slots__ = ("arrays", "layers", "layout", "packets")

    def __init__(
        self, packets: list[ParsedPacket], layout: _updates.Layout, arrays: list[Any]
    ) -> None:
        self.packets, self.layout, self.arrays = packets, layout, arrays
        self.layers = [View(0, _arrays.numel(x), "float32", "cpu", x) for x in arrays]

    def __len__(self) -> int:
        return len(self.packets)

    @property
    def results(self) -> list[View]:
        """What the layers of a result are like."""
        names = [_arrays.dtype_name(x) for x in self.arrays]
        return [v._replace(dtype=d) for v, d in zip(self.layers, names, strict=True)]

    @property
    def native(self) -> list[Any]:
        """Native views of the packets, checked."""
        return [p.view for p in self.packets]

    def take(self, rows: Iterable[int]) -> PacketRows:
        """Return some of the packets, in the order given."""
        return PacketRows([self.packets[i] for i in rows], self.layout, self.arrays)

    def beside(self, layers: Sequence[Any], name: str) -> PacketRows:
        """Return these packets and one that holds an update as it is, rounded to float32.

        Raises
        ------
        NonFiniteError
            The update holds a NaN or an infinity.
        """
        views = self.layout.views(layers, name)
        with np.errstate(over="ignore"):
            parts = [np.asarray(v.array, np.float32).reshape(-1) for v in views]
        flat = np.concatenate(parts) if parts else np.empty(0, np.float32)
        if not np.isfinite(flat).all():
            raise NonFiniteError(f"{name}: NaN or infinity found in float32")
        return PacketRows([*self.packets, _raw_packet(flat)], self.layout, self.arrays)

    def deliver(self, out: Sequence[Any] | None, run: Callable[[list[View]], None]) -> list[Any]:
        """Let ``run(targets)`` write float32 layers; return them in the dtypes of a result."""
        results = [_arrays.empty_like(x) for x in self.arrays] if out is None else list(out)
        targets, later = [], []
        for j, (x, like) in enumerate(zip(results, self.results, strict=True)):
            view = _arrays.writable_view(x, self.layout.label("out", j), like)
            if view is None or view.dtype != "float32":
                view = _arrays.view(np.empty(like.numel, np.float32))
                later.append((x, view.array))
            targets.append(view)
        run(targets)
        for x, values in later:
            _arrays.assign(x, values)
        return results


def holds_packets(updates: Any) -> bool:
    """Whether `updates` is a list or tuple with packets, or bytes, in it."""
    return isinstance(updates, list | tuple) and any(
        isinstance(u, ParsedPacket | Bytes) for u in updates
    )


def packet_rows(
    updates: Any, like: Any = None, *, name: str = "updates", like_name: str = "like"
) -> PacketRows | None:
    """Return the packets that `updates` holds, or None when it does not hold packets.

    Parameters
    ----------
    updates : any
        A list or tuple of packets, or of bytes, which are then checked.
    like : update, optional
        What a result is like: layers of floating values on the CPU, as many values together as a
        packet. By default one float32 array (numel,).
    name, like_name : str
        What messages call them.

    Raises
    ------
    InvalidInputError
        Numbers of coordinates differ; or `like` without packets.
    DTypeError
        Only some are packets; or `like` is not of floating layers on the CPU.
    PacketError
        Bytes that are not a packet.
    """
    if not holds_packets(updates):
        if like is not None:
            raise InvalidInputError(f"like: goes with packets, and {name} holds none; leave it out")
        return None
    packets = []
    for i, u in enumerate(updates):
        if isinstance(u, Bytes):
            u = ParsedPacket(np.frombuffer(bytes(u), np.uint8))
        if not isinstance(u, ParsedPacket):
            raise DTypeError(f"{name}[{i}]: expected a packet like the others, got {_kind(u)}")
        packets.append(u)
    numel = packets[0].header.numel
    for i, p in enumerate(packets):
        if p.header.numel != numel:
            raise InvalidInputError(
                f"{name}[{i}]: holds {p.header.numel} coordinates, {name}[0] holds {numel}"
            )
    if like is None:
        like = np.broadcast_to(np.float32(0), (numel,))
    layout, arrays = _updates.flatten(like, like_name)
    for j, x in enumerate(arrays):
        if not _arrays.is_float(x) or _arrays.device_of(x) != "cpu":
            raise DTypeError(
                f"{layout.label(like_name, j)}: expected {_arrays.FLOATS} on the CPU, got "
                f"{_arrays.dtype_name(x)} on {_arrays.device_of(x)}"
            )
    held = sum(_arrays.numel(x) for x in arrays)
    if held != numel:
        raise InvalidInputError(f"{like_name}: holds {held} values, {name}[0] holds {numel}")
    return PacketRows(packets, layout, arrays)


def _kind(x: Any) -> str:
    return "an array" if _arrays.is_array(x) else type(x).__name__


def _raw_packet(values: np.ndarray) -> ParsedPacket:
    """Return a packet of codec dense that holds finite float32 values as they are."""
    return _packet("dense", 32, values.size, [(wire.CODES, 1, values.view(np.uint8))])


def sign_packet(layers: Sequence[View]) -> ParsedPacket:
    """Return a packet of codec sign with the signs of an update on the CPU, of scale 1."""
    bits = [np.asarray(v.array < 0).reshape(-1) for v in layers]
    negative = np.concatenate(bits) if bits else np.empty(0, bool)
    scales = np.ones(-(-negative.size // wire.MAX_BUCKET), "<f4").view(np.uint8)
    codes = np.packbits(negative, bitorder="little")
    sections = [(wire.SCALES, 4, scales), (wire.CODES, 1, codes)]
    return _packet("sign", 1, negative.size, sections)


def _packet(
    codec: str, bits: int, numel: int, sections: Sequence[tuple[int, int, np.ndarray]]
) -> ParsedPacket:
    frame = _native.core.PacketFrame(
        codec=wire.CODECS[codec],
        numel=numel,
        value_dtype=wire.VALUE_CODES["float32"],
        form=0,
        bits=bits,
        tile=wire.MAX_BUCKET,
        source_dtype=wire.SOURCE_DTYPES["float32"],
        flags=0,
        round=0,
        seed=0,
        epoch=0,
        sections=[(kind, element, body.size) for kind, element, body in sections],
    )
    data = np.empty(frame.nbytes, np.uint8)
    for kind, _, body in sections:
        data[frame.offset(kind) :][: body.size] = body
    frame.seal(_arrays.address(data))
    return ParsedPacket(data, trusted=True)


def by_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a reference of an op on rows as one on packets: it decodes them first."""

    def run(rows: PacketRows, *args: Any, **options: Any) -> Any:
        decoded = []
        for packet in rows.packets:
            layers = [np.empty(v.numel, np.float32) for v in rows.layers]
            if layers:
                decode_into(packet, layers, variant="reference")
            decoded.append([_arrays.view(x) for x in layers])
        return function(decoded, *args, **options)

    return run
