"""Packets in pieces: reading one from a stream, and cutting one for a transport."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from flcore.compression._packet import Packet
from flcore.errors import DTypeError, InvalidInputError, PacketError
from flcore.reference import wire
from flcore.reference.wire import Header, Limits
from flcore.reference.wire_frame import HEADER_BYTES, SLACK_BYTES, TENSOR_BYTES

__all__ = ["PacketReader", "split"]


class PacketReader:
    """Collects one packet from pieces of any size, such as the messages of a gRPC stream.

    The first 64 bytes tell how long the packet is, and are checked against the limits as soon as
    they are there; only then is memory for the packet taken, once, of exactly its size. Until then
    64 bytes are held.

    Parameters
    ----------
    limits : Limits, optional
        What to accept; by default updates of up to 2**32 coordinates.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import Encoder, PacketReader, TopK, split
    >>> packet = Encoder(TopK(k=2), like=np.zeros(5)).encode(np.arange(5.0))
    >>> reader = PacketReader()
    >>> for chunk in split(packet, 100):
    ...     reader.feed(chunk)
    >>> reader.packet() == packet
    True
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._buffer = np.empty(HEADER_BYTES, np.uint8)
        self._held = 0
        self._header: Header | None = None
        self._packet: Packet | None = None
        self._error: PacketError | None = None

    @property
    def header(self) -> Header | None:
        """The header, None until its 64 bytes are there."""
        return self._header

    @property
    def received(self) -> int:
        """Bytes held so far."""
        return self._held

    @property
    def missing(self) -> int:
        """Bytes that are missing: to the end of the header, then to the end of the packet."""
        return int(self._buffer.size) - self._held

    @property
    def done(self) -> bool:
        """Whether all bytes of the packet are there; :meth:`packet` then checks them."""
        return self._header is not None and self.missing == 0

    def feed(self, chunk: Any, *, rest: bool = False) -> memoryview | None:
        """Take the next bytes.

        Parameters
        ----------
        chunk : bytes-like
            Contiguous bytes; copied. May be empty.
        rest : bool
            Give back what follows the end of the packet, as a view of `chunk`, instead of refusing
            it: for streams that carry one packet after another.

        Returns
        -------
        memoryview or None
            With `rest`, the bytes behind the packet (none while it is not done).

        Raises
        ------
        PacketError
            The header is not one to be accepted, or bytes follow the packet. The reader takes no
            more then; every later call raises the same.
        DTypeError
            `chunk` is not bytes-like; the reader is as before.
        """
        if self._error is not None:
            raise self._error
        data = _bytes_view(chunk)
        try:
            while data.size and not self.done:
                data = data[self._take(data) :]
                if self._header is None and self.missing == 0:
                    self._open()
            if data.size and not rest:
                raise PacketError(
                    f"packet: {data.size} bytes follow the {self._buffer.size} of the packet"
                )
        except PacketError as error:
            self._error = error
            self._buffer, self._held = np.empty(0, np.uint8), 0
            raise
        return _view(data) if rest else None

    def _take(self, data: np.ndarray) -> int:
        count = min(int(data.size), self.missing)
        self._buffer[self._held : self._held + count] = data[:count]
        self._held += count
        return count

    def _open(self) -> None:
        """Check the header and make room for the whole packet."""
        header = wire.read_header(self._buffer.tobytes(), self._limits)
        most = 8 * header.numel + SLACK_BYTES + TENSOR_BYTES * self._limits.max_tensors
        if header.payload_bytes > most:
            raise PacketError(
                f"packet: a payload of {header.payload_bytes} bytes for {header.numel} "
                f"coordinates, at most {most}"
            )
        whole = np.empty(header.nbytes, np.uint8)
        whole[:HEADER_BYTES] = self._buffer
        self._buffer, self._header = whole, header

    def packet(self) -> Packet:
        """Check the bytes and return the packet, which owns them; the same one every time.

        Raises
        ------
        PacketError
            Bytes are missing, or anything about them is not as docs/packet.md says.
        """
        if self._error is not None:
            raise self._error
        if not self.done:
            what = "packet" if self._header is not None else "header"
            raise PacketError(
                f"packet: {self._held} of {self._buffer.size} bytes of the {what} have come"
            )
        if self._packet is None:
            self._packet = Packet(self._buffer, limits=self._limits)
        return self._packet


def split(packet: Any, max_bytes: int) -> Iterator[memoryview]:
    """Yield the bytes of a packet in pieces, without a copy.

    Parameters
    ----------
    packet : Packet, bytes-like or 1-D uint8 array
        Not checked.
    max_bytes : int
        Length of all pieces but the last, at least 1. Messages of gRPC hold 4 MiB by default, with
        all that is around the bytes.

    Raises
    ------
    InvalidInputError
        `max_bytes` is not a positive integer.
    DTypeError
        `packet` is not bytes.
    """
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
        raise InvalidInputError(f"max_bytes: expected a positive integer, got {max_bytes!r}")
    data = packet.to_numpy() if isinstance(packet, Packet) else _bytes_view(packet, "packet")
    view = _view(data)
    return (view[at : at + max_bytes] for at in range(0, len(view), max_bytes))


def _view(data: np.ndarray) -> memoryview:
    return memoryview(data)  # type: ignore[arg-type]


def _bytes_view(chunk: Any, name: str = "chunk") -> np.ndarray:
    """View contiguous bytes as a uint8 array."""
    try:
        view = memoryview(chunk)
    except TypeError:
        raise DTypeError(f"{name}: expected bytes, got {type(chunk).__name__}") from None
    if not view.c_contiguous or view.itemsize != 1:
        raise DTypeError(
            f"{name}: expected contiguous bytes, got items of {view.itemsize} bytes "
            f"and strides {view.strides}"
        )
    return np.frombuffer(view, np.uint8)
