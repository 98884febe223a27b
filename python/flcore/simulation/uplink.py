"""The way of an update from a client to the server, through the bytes that would be sent.

Both ends of the link live in one object here, and nothing but `bytes` passes between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from flcore._extras import require
from flcore.algorithms.layout import Parameters, Vector, named_views
from flcore.algorithms.state import Payload
from flcore.compression import Encoder, EpochError, Limits, Packet, PacketError
from flcore.simulation.settings import Settings

__all__ = [
    "DenseUplink",
    "PacketUplink",
    "Uplink",
    "make_uplink",
    "pack_rest",
    "payload_bytes",
    "unpack_rest",
    "vector_bytes",
]

State = dict[int, dict[str, Any]]
"""What clients keep between rounds: client -> name -> array or plain value."""


class Uplink(Protocol):
    """Turns an update into bytes at the client, and into something to sum at the server."""

    def pack(self, client: int, update: Vector, round: int) -> bytes:
        """Give the message of `client`, updating what the client keeps."""

    def unpack(self, client: int, message: bytes, round: int) -> Packet | Vector:
        """Give what `Accumulator.add` takes; raises `PacketError` if the message is not right."""

    def state_dict(self) -> State:
        """Give what clients keep between rounds."""

    def load_state_dict(self, state: State) -> None:
        """Set what clients keep between rounds."""


def make_uplink(
    settings: Settings, like: Parameters, unit: Callable[[int], float] = lambda round: 1.0
) -> Uplink:
    """Give the uplink that the settings ask for, for models shaped `like` this one.

    `unit` gives the local learning rate of a round: what updates are proportional to.
    """
    if settings.codec is None:
        return DenseUplink(like)
    return PacketUplink(settings, like, unit)


def vector_bytes(vector: Vector) -> bytes:
    """Give a model or an update as plain little-endian float32 values."""
    return vector.astype("<f4", copy=False).tobytes()


def pack_rest(payload: Payload, main: str | None = None) -> bytes:
    """Give all of a message but its entry `main`, in the safetensors format; nothing if empty."""
    rest = {name: np.asarray(v, order="C") for name, v in payload.items() if name != main}
    return require("safetensors.numpy", extra="train").save(rest) if rest else b""


def payload_bytes(payload: Payload) -> int:
    """Give the bytes of the values in a message."""
    return sum(np.asarray(value).nbytes for value in payload.values())


def unpack_rest(message: bytes) -> Payload:
    """Read what `pack_rest` wrote, by name in order; arrays without dimensions become numbers."""
    if not message:
        return {}
    arrays = require("safetensors.numpy", extra="train").load(message)
    in_order = sorted(arrays.items())  # as they come from the file, they are in any order
    return {name: value if value.ndim else value.item() for name, value in in_order}


class DenseUplink:
    """Float32 values without a header: 4 bytes a parameter, nothing kept between rounds.

    Parameters
    ----------
    like : dict of arrays
        Names and shapes of an update.
    """

    def __init__(self, like: Parameters) -> None:
        self._numel = sum(value.size for value in like.values())

    def pack(self, client: int, update: Vector, round: int) -> bytes:
        """Give the values."""
        return vector_bytes(update)

    def unpack(self, client: int, message: bytes, round: int) -> Vector:
        """Give a view of the message."""
        if len(message) != 4 * self._numel:
            raise PacketError(
                f"message of client {client}: expected {4 * self._numel} bytes, got {len(message)}"
            )
        return np.frombuffer(message, dtype="<f4")

    def state_dict(self) -> State:
        """Give nothing: a dense uplink has no memory."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Take nothing."""


class PacketUplink:
    """Compressed packets, made by one encoder for each client that has taken part.

    An encoder with error control holds up to two vectors as long as the model, so the memory is
    8 bytes times parameters times clients seen.  The server counts the packets it took from each
    client; the epoch in a packet must say the same, or the client and the server no longer agree
    about the state of the error control.  That state is in the units of an update; a client that
    comes back when the local learning rate has changed scales it by the ratio of the two.

    Parameters
    ----------
    settings : Settings
        Its `codec`, `feedback`, `start` and `seed`.
    like : dict of arrays
        Names and shapes of an update.
    unit : function
        Gives the local learning rate of a round.
    """

    def __init__(
        self,
        settings: Settings,
        like: Parameters,
        unit: Callable[[int], float] = lambda round: 1.0,
    ) -> None:
        self._settings = settings
        self._unit = unit
        self._like = like
        self._numel = sum(value.size for value in like.values())
        self._limits = Limits(max_numel=self._numel)
        self._encoders: dict[int, Encoder] = {}
        self._taken: dict[int, int] = {}
        self._units: dict[int, float] = {}

    def pack(self, client: int, update: Vector, round: int) -> bytes:
        """Compress, and carry what was left out to the client's next round."""
        encoder = self._encoder(client)
        unit = self._unit(round)
        before = self._units.get(client, unit)
        if before != unit:
            encoder.rescale(unit / before)
        self._units[client] = unit
        named = named_views(update, {name: value.shape for name, value in self._like.items()})
        return bytes(encoder.encode(named, round=round, seed=self._settings.seed))

    def unpack(self, client: int, message: bytes, round: int) -> Packet:
        """Check the packet and give it, still compressed."""
        packet = Packet.from_bytes(message, limits=self._limits)
        header, taken = packet.header, self._taken.get(client, 0)
        increment = self._settings.controls_server and not self._dense(taken)
        for what, got, expected in (
            ("values", header.numel, self._numel),
            ("round", header.round, round),
            ("epoch", header.epoch, taken),
            ("increment flag", header.increment, increment),
        ):
            if got != expected:
                text = f"packet of client {client}: {what}: expected {expected}, got {got}"
                if what == "epoch":
                    raise EpochError(text, client, taken, header.epoch)
                raise PacketError(text)
        self._taken[client] = packet.header.epoch + 1
        return packet

    def state_dict(self) -> State:
        """Give the state of every encoder, and the unit that it is in."""
        return {
            client: encoder.state_dict() | {"unit": self._units[client]}
            for client, encoder in self._encoders.items()
        }

    def load_state_dict(self, state: State) -> None:
        """Set the encoders, dropping those that `state` has not."""
        self._encoders, self._taken, self._units = {}, {}, {}
        for client, values in state.items():
            encoder = self._encoder(client)
            self._units[client] = values["unit"]
            encoder.load_state_dict({k: v for k, v in values.items() if k != "unit"})
            self._taken[client] = encoder.epoch

    def _encoder(self, client: int) -> Encoder:
        if client not in self._encoders:
            settings = self._settings
            self._encoders[client] = Encoder(
                settings.codec,
                settings.feedback,
                like=self._like,
                client=client,
                start=settings.start,
            )
        return self._encoders[client]

    def _dense(self, epoch: int) -> bool:
        """Whether the packet of that epoch is h in full and not an increment."""
        return self._settings.start == "dense" and epoch == 0
