"""What all codecs have in common: settings, and one call that turns an update into a packet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from flcore._state import State
from flcore.compression._settings import Settings

__all__ = ["Codec", "Job", "eta_of_bits"]


@dataclass(frozen=True)
class Job:
    """One update on its way into a packet.

    Attributes
    ----------
    update : update
        As the user gave it, checked against the layout.
    shapes : tuple of tuples of int
        Shape of each layer.
    numel : int
        Number of coordinates d, all layers together.
    state : State
        Memory of the client; moved on by the codec, and only when the packet is finished.
    memory : dict
        What the codec itself remembers between packets of one encoder (a threshold, the factors of
        a low-rank form): arrays and plain values by name, saved with the state of the encoder.
        Changed only when the packet is finished, and empty at the first packet of a new state.
    round, seed, epoch, flags : int
        Header fields.
    tensors : bytes
        Tensor table, or nothing.
    client : int
        Number of the client, for codecs whose seed is shared: they draw from streams of their own
        what the others need not know.
    options : mapping
        What the caller of :meth:`Encoder.encode` gave for this packet alone.
    """

    update: Any
    shapes: tuple[tuple[int, ...], ...]
    numel: int
    state: State
    memory: dict[str, Any]
    round: int
    seed: int
    epoch: int
    flags: int
    tensors: bytes
    client: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def header(self) -> dict[str, Any]:
        """Header fields and tensor table, as the ops take them."""
        names = ("round", "seed", "epoch", "flags", "tensors")
        return {name: getattr(self, name) for name in names}


class Codec(Settings, ABC):
    """How an update becomes a packet; frozen dataclasses derive from it.

    A codec holds settings only. Everything it remembers lives in the encoder, so that one codec
    can serve any number of clients.

    Attributes
    ----------
    shared_seed : bool
        Whether all clients must use the same random numbers, so that their packets can be summed
        before they are decoded. Otherwise an encoder mixes the client's number into the seed.
    dense_state : bool
        Whether a packet changes h at every coordinate, so that h needs a spare too.
    takes_feedback : bool
        Whether an encoder may combine it with an error control.
    """

    family: ClassVar[str] = "codec"
    shared_seed: ClassVar[bool] = False
    dense_state: ClassVar[bool] = True
    takes_feedback: ClassVar[bool] = True

    def check(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise `InvalidInputError` unless updates of layers of these shapes can be encoded."""

    def needs_spares(self, memory: Mapping[str, Any]) -> bool:
        """Return whether new state must not replace the old one while the packet is made.

        True where one pass over memory finds out whether all values are finite and writes the
        state; a codec that reads everything once before it writes updates in place.
        """
        return True

    @abstractmethod
    def eta(self, numel: int) -> float:
        """Return the strength of the memory that suits this codec: EControl's ``eta="auto"``."""

    @abstractmethod
    def encode(self, job: Job) -> np.ndarray:
        """Return the packet, (nbytes,) uint8, and move state and memory on.

        Raises
        ------
        NonFiniteError
            A value to be sent is not finite; state and memory are unchanged.
        """


def eta_of_bits(bits: int) -> float:
    """Return the eta of codecs that send every coordinate: finer codes bear a stronger memory."""
    return 0.3 if bits <= 2 else 0.5
