"""Compression on the way back: the server's end, and the replica that every client keeps."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore import _arrays, _updates
from flcore.compression._client_state import check_layer, flat_float32, read_array, unflatten
from flcore.compression._codec import Codec
from flcore.compression._encoder import Encoder
from flcore.compression._feedback import Feedback
from flcore.compression._packet import Packet
from flcore.errors import EpochError, NonFiniteError, PacketError
from flcore.ops.decode import ParsedPacket, decode_add_into, decode_into
from flcore.reference import wire

__all__ = ["Downlink", "Replica"]


class Replica:
    """What a client knows of the vector that the server broadcasts with `Downlink`.

    Increments are added to what is there; a packet that stands for itself (error feedback, or none)
    replaces it. All replicas, and `Downlink.value`, hold the same bits.

    Parameters
    ----------
    like : update
        Gives structure, shapes, dtypes and device of `value`; float32 is kept inside.
    values : update, optional
        Where to start, as `Downlink.start_at`; zeros otherwise.
    limits : Limits, optional
        What packets to accept when they come as bytes.

    Attributes
    ----------
    epoch : int
        Epoch of the next packet.
    """

    def __init__(self, like: Any, values: Any = None, *, limits: wire.Limits | None = None) -> None:
        self._layout, layers = _updates.flatten(like, "like")
        for i, x in enumerate(layers):
            check_layer(x, self._layout.label("like", i))
        self._like = [_arrays.empty_like(x) for x in layers]
        self.numel = sum(_arrays.numel(x) for x in layers)
        self._limits = limits or wire.Limits(max_numel=max(self.numel, 1))
        self.epoch = 0
        self._last: tuple[int, int] | None = None
        self._value = np.zeros(self.numel, np.float32)
        if values is not None:
            self._value = flat_float32(self._layout.layers(values, "values"))
            if not np.isfinite(self._value).all():
                raise NonFiniteError("values: expected finite float32 values")

    @property
    def value(self) -> Any:
        """The vector, a copy, of the structure, dtypes and device of `like`."""
        return unflatten(self._layout, [_arrays.empty_like(x) for x in self._like], self._value)

    def apply(self, packet: Any) -> Any:
        """Take a packet of the server and return the new `value`.

        The packet that was taken last is not taken again when it is repeated.

        Raises
        ------
        EpochError
            An increment before this one is missing: ask the server for `Downlink.resync`.
        PacketError
            The bytes are not a packet, or of another size.

        In each case nothing has changed.
        """
        own = isinstance(packet, ParsedPacket)
        parsed = packet if own else Packet.from_bytes(packet, self._limits)
        header = parsed.header
        if header.numel != self.numel:
            raise PacketError(f"packet: expected {self.numel} values, got {header.numel}")
        _ = parsed.view
        if header.nonfinite or (header.epoch, header.crc) == self._last:
            return self.value
        if header.increment and header.epoch != self.epoch:
            raise EpochError(
                f"packet: expected epoch {self.epoch}, got {header.epoch}: the packets between "
                "were not applied; ask the server for Downlink.resync()",
                None,
                self.epoch,
                header.epoch,
            )
        if header.increment:
            decode_add_into([parsed], [1.0], [self._value])
        else:
            decode_into(parsed, [self._value])
        self.epoch = (header.epoch + 1) % 2**32
        if header.flags & wire.FLAG_CHECKSUM:
            self._last = (header.epoch, header.crc)
        return self.value


class Downlink:
    """Compress what the server broadcasts, with an error control of its own.

    ======================  ========================================================================
    method                  how
    ======================  ========================================================================
    two-way error feedback  ``Downlink(codec, EF14(), like)``: `send` the mean M of the decoded
                            packets; all step along the decoded D. ``D + e' = M + e``
    EF21-BC                 ``Downlink(codec, EF21(), like)``: `send` the H of `ControlledSum`;
                            clients keep ``S <- S + D`` and step along S
    EF21-P                  ``Downlink(codec, EF21(), like)`` and `start_at` the first model: `send`
                            the model x; clients evaluate gradients at their replica w
    ======================  ========================================================================

    The server itself steps along `value`, as the clients do, so that no model has to be sent.

    Parameters
    ----------
    codec, feedback, like
        As for `Encoder`; `like` is what is sent.
    **options
        Of `Encoder`.

    References
    ----------
    Zheng, Huang, Kwok, "Communication-Efficient Distributed Blockwise Momentum SGD with
    Error-Feedback", NeurIPS 2019. Fatkhullin et al., "EF21 with Bells & Whistles", arXiv
    2110.03294. Gruntkowska, Tyurin, Richtarik, "EF21-P and Friends", ICML 2023, arXiv 2209.15218.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import Downlink, EF21, Replica, TopK
    >>> mean = np.array([4.0, -3.0, 2.0, 1.0], np.float32)
    >>> server = Downlink(TopK(k=1), EF21(), like=mean)
    >>> client = Replica(like=mean)
    >>> for _ in range(2):
    ...     print(client.apply(server.send(mean)))
    [4. 0. 0. 0.]
    [ 4. -3.  0.  0.]
    >>> bool((server.value == client.value).all())
    True
    """

    def __init__(
        self, codec: Codec, feedback: Feedback | None = None, *, like: Any, **options: Any
    ) -> None:
        self._encoder = Encoder(codec, feedback, like=like, **options)
        self._replica = Replica(like)

    @property
    def encoder(self) -> Encoder:
        """The encoder, for its state."""
        return self._encoder

    @property
    def value(self) -> Any:
        """What every client has after the last packet, of the structure of `like`; a copy."""
        return self._replica.value

    def send(self, values: Any, round: int = 0, seed: int = 0) -> Packet:
        """Return the packet to broadcast; raises as `Encoder.encode`."""
        packet = self._encoder.encode(values, round=round, seed=seed)
        self._replica.apply(packet)
        return packet

    def resync(self, round: int = 0) -> Packet:
        """Return `value` in full, for clients that are new or missed a packet; changes nothing.

        Raises
        ------
        InvalidInputError
            The error control keeps no h: every packet then stands for itself.
        """
        return self._encoder.resync(round=round)

    def start_at(self, values: Any) -> None:
        """Start anew from values that all clients have: see `Encoder.start_at`."""
        self._encoder.start_at(values)
        self._replica = Replica(values, values)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state, as `Encoder.state_dict`, and "value" (d,) float32."""
        return self._encoder.state_dict() | {"value": self._replica._value.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; raises as `Encoder.load_state_dict`."""
        rest = {name: x for name, x in state.items() if name != "value"}
        mine = self._replica._value
        value = read_array(state, "value", mine.dtype, mine.shape)
        self._encoder.load_state_dict(rest)
        np.copyto(mine, value)
        self._replica.epoch = self._encoder.epoch
