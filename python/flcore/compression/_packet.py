"""The packet as an object, and the functions that read packets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _updates
from flcore._extras import require
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops import decode as ops
from flcore.reference import wire
from flcore.reference.wire import Header, Limits, TensorEntry

__all__ = ["Packet", "decode", "decode_add", "peek"]


class Packet(ops.ParsedPacket):
    """A compressed update as bytes that cannot change: what a client sends.

    Made by :meth:`Encoder.encode` and :meth:`from_bytes`; docs/packet.md describes the bytes.
    """

    __slots__ = ()

    @classmethod
    def from_bytes(cls, buffer: Any, limits: Limits | None = None) -> Packet:
        """Check received bytes and return them as a packet.

        Parameters
        ----------
        buffer : bytes, bytearray, memoryview, or 1-D uint8 array (NumPy or torch on the CPU)
            Exactly one packet. `bytes` are used as they are, anything else is copied, so that
            nobody can change what was checked.
        limits : Limits, optional
            What to accept; by default updates of up to 2**32 coordinates.

        Raises
        ------
        PacketError
            The bytes are truncated, corrupt, of another version, or beyond the limits. Whatever
            the bytes, nothing worse happens, and nothing of a claimed size is allocated before it
            was checked.
        DTypeError
            `buffer` is not bytes or a uint8 array.
        """
        return cls(_as_array(buffer), limits=limits)

    def __bytes__(self) -> bytes:
        return self._buffer.tobytes()

    def __reduce__(self) -> tuple:
        return Packet.from_bytes, (bytes(self), ops._NO_LIMITS)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Packet):
            return NotImplemented
        return np.array_equal(self._buffer, other._buffer)

    def __hash__(self) -> int:
        return hash(bytes(self))

    def __repr__(self) -> str:
        h = self.header
        return (
            f"<Packet: {self.k} of {h.numel} {h.value_dtype} values, {h.index}, "
            f"{self.nbytes} bytes, round {h.round}>"
        )

    def to_numpy(self) -> np.ndarray:
        """Return the bytes as a read-only 1-D uint8 array, without a copy.

        ``memoryview(packet.to_numpy())`` is the same for what reads buffers.
        """
        return self._buffer

    def to_torch(self) -> Any:
        """Return the bytes as a 1-D uint8 tensor on the CPU: a copy, because tensors can change.

        Raises
        ------
        MissingDependencyError
            torch is not installed.
        """
        torch = require("torch", extra="torch")
        return torch.from_numpy(self._buffer.copy())

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Export a copy of the bytes as 1-D uint8 on the CPU, for any reader of DLPack.

        Raises
        ------
        BufferError
            `copy` is False, or another device is asked for: what reads DLPack may write.
        """
        if copy is False:
            raise BufferError("a packet cannot change: its bytes are exported as a copy only")
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"a packet lies on the CPU, device (1, 0), not {dl_device}")
        return self._buffer.copy().__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the CPU's device in DLPack."""
        return (1, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the packet."""
        return int(self._buffer.size)

    @property
    def ratio(self) -> float:
        """Bytes of the update as dense float32 values, divided by the bytes of the packet."""
        return 4 * self.header.numel / self.nbytes

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        """The tensor table; empty when the sender wrote none."""
        return self.body().tensors


def _as_array(buffer: Any) -> np.ndarray:
    """View `bytes` and copy everything else into a 1-D uint8 array."""
    if isinstance(buffer, bytes):
        return np.frombuffer(buffer, np.uint8)
    if isinstance(buffer, bytearray | memoryview):
        return np.frombuffer(bytes(buffer), np.uint8)
    if _arrays.is_torch(buffer):
        buffer = buffer.detach().cpu().numpy()
    if isinstance(buffer, np.ndarray) and buffer.dtype == np.uint8 and buffer.ndim == 1:
        return np.array(buffer, order="C", copy=True)
    what = type(buffer).__name__
    if isinstance(buffer, np.ndarray):
        what = f"{buffer.ndim}-D array of {buffer.dtype}"
    raise DTypeError(f"buffer: expected bytes or a 1-D uint8 array, got {what}")


def _as_packet(packet: Any, name: str) -> ops.ParsedPacket:
    if isinstance(packet, ops.ParsedPacket):
        return packet
    try:
        return Packet.from_bytes(packet)
    except DTypeError:
        raise DTypeError(
            f"{name}: expected a Packet or its bytes, got {type(packet).__name__}"
        ) from None


def peek(buffer: Any, limits: Limits | None = None) -> Header:
    """Read the header, without looking at the sections or the checksum.

    Parameters
    ----------
    buffer : bytes-like, 1-D uint8 array or Packet
        A packet, or its first 64 bytes or more.
    limits : Limits, optional
        What to accept.

    Raises
    ------
    PacketError
        The first 64 bytes are not a header this version can read.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import Encoder, TopK
    >>> packet = Encoder(TopK(k=2), like=np.zeros(5)).encode(np.arange(5.0), round=7)
    >>> peek(bytes(packet)).round
    7
    """
    if isinstance(buffer, ops.ParsedPacket):
        return buffer.header
    if isinstance(buffer, bytes | bytearray | memoryview):
        head = bytes(memoryview(buffer).cast("B")[: wire.HEADER_BYTES])
    else:
        head = _as_array(buffer[: wire.HEADER_BYTES]).tobytes()
    return wire.read_header(head, limits)


def decode(packet: Any, out: Any = None, like: Any = None) -> Any:
    """Return the update that a packet stands for: the sent values, 0 elsewhere.

    Parameters
    ----------
    packet : Packet or bytes
        Bytes are checked as :meth:`Packet.from_bytes` does.
    out : update, optional
        Written and returned; any floating dtype.
    like : update, optional
        The result has its structure, shapes, dtypes and device.

    Returns
    -------
    update
        `out`, or something like `like`, or a float32 array (numel,).

    Raises
    ------
    PacketError
        The bytes are not a packet.
    InvalidInputError
        `out` or `like` holds another number of values; nothing is written.
    DTypeError
        `out` or `like` has a layer that is not floating.
    """
    packet = _as_packet(packet, "packet")
    if out is not None and like is not None:
        raise InvalidInputError("out and like: expected one of the two, got both")
    if out is None and like is None:
        return ops.decode(packet)
    layout, layers = _updates.flatten(
        like if out is None else out, "like" if out is None else "out"
    )
    views = layout.views(layers, "out")
    if out is not None:
        for i, (x, v) in enumerate(zip(layers, views, strict=True)):
            _arrays.writable_view(x, layout.label("out", i), like=v)
    else:
        layers = [_arrays.empty_like(x) for x in layers]
    buffers = [
        x if _direct(x) else np.empty(v.numel, np.float64 if v.dtype == "float64" else np.float32)
        for x, v in zip(layers, views, strict=True)
    ]
    ops.decode_into(packet, buffers)
    for x, buffer in zip(layers, buffers, strict=True):
        if buffer is not x:
            _arrays.assign(x, buffer)
    return out if out is not None else layout.build(layers)


def _direct(x: Any) -> bool:
    """Whether the kernel can write into `x`."""
    return _arrays.dtype_name(x) in ("float32", "float64") and _arrays.device_of(x) == "cpu"


def decode_add(packets: Sequence[Any], weights: Any, out: Any) -> Any:
    """Add ``sum_i weights[i] * decode(packets[i])`` to `out`, and return `out`.

    No packet is made dense. Packets are added in list order, so that the result has the same bits
    on every machine; a packet of weight 0 is not added, but checked like the others.

    Parameters
    ----------
    packets : sequence of Packet or bytes
        All are checked before anything is written.
    weights : numbers, one a packet
        Finite, any sign.
    out : update
        float32 or float64, NumPy or torch on the CPU, as many values as the packets.

    Raises
    ------
    PacketError
        One of the packets is not right; `out` is untouched.
    InvalidInputError, DTypeError
        Weights or `out` cannot be used; `out` is untouched.
    """
    if isinstance(packets, ops.ParsedPacket | bytes | bytearray | memoryview):
        raise DTypeError("packets: expected a list of packets, got one; write [packet]")
    parsed = [_as_packet(p, f"packets[{i}]") for i, p in enumerate(packets)]
    _, layers = _updates.flatten(out, "out")
    ops.decode_add_into(parsed, weights, layers)
    return out
