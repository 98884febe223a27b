"""The client's end: an encoder that keeps the state of the error control between rounds."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore import _arrays, _updates
from flcore.compression._feedback import EF14, EControl
from flcore.compression._packet import Packet
from flcore.compression._topk import TopK
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops.sparsify import sparsify
from flcore.reference import wire, wire_writer

__all__ = ["Encoder"]


class Encoder:
    """Compress the updates of one client into packets.

    Parameters
    ----------
    codec : TopK
        What is sent, and how.
    feedback : EF14, EControl or None
        What is remembered of the rest.
    like : update
        An array, or a list, tuple or dict of arrays of float64, float32, float16 or bfloat16 on the
        CPU; every update must be alike in structure, shapes and dtypes. Only read for those.
    nonfinite : {"raise", "skip"}
        What a NaN or an infinity in an update does: raise, or send an empty packet with the
        non-finite flag set. The state is unchanged either way.
    tensor_table : bool
        Write names (as hashes) and shapes of the layers into every packet, 64 bytes a layer.

    Attributes
    ----------
    numel : int
        Number of coordinates d of an update.
    k : int
        Number of entries a packet holds.
    e, h : (d,) float32 arrays or None
        The state: what was not sent yet, and what the server believes.
    epoch : int
        Packets that this state has produced: 0 for fresh state, and written into every packet. A
        server that counts the packets it took from a client finds, by comparing the two, lost and
        repeated packets (the counts differ) and clients that lost their state (0 again) or took an
        old one (a smaller count); sums of increments (EControl) must then be resynchronised.
        Skipped updates do not change the state and do not count. Counts modulo 2**32.

    Notes
    -----
    Memory: 4 bytes a coordinate for EF14, 8 for EControl. Cost of `encode`: see
    :func:`flcore.ops.sparsify.sparsify`. Calls must not overlap in time.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import EControl, Encoder, TopK, decode
    >>> g = np.array([4.0, -3.0, 2.0, 1.0], np.float32)
    >>> encoder = Encoder(TopK(k=1), EControl(eta=0.5), like=g)
    >>> for _ in range(2):
    ...     print(decode(encoder.encode(g)))
    [4. 0. 0. 0.]
    [ 0.  -4.5  0.   0. ]
    """

    def __init__(
        self,
        codec: TopK,
        feedback: EF14 | EControl | None = None,
        *,
        like: Any,
        nonfinite: str = "raise",
        tensor_table: bool = False,
    ) -> None:
        if not isinstance(codec, TopK):
            raise DTypeError(f"codec: expected TopK, got {type(codec).__name__}")
        if feedback is not None and not isinstance(feedback, EF14 | EControl):
            raise DTypeError(
                f"feedback: expected EF14, EControl or None, got {type(feedback).__name__}"
            )
        if nonfinite not in ("raise", "skip"):
            raise InvalidInputError(f"nonfinite: expected raise or skip, got {nonfinite!r}")
        self.codec, self.feedback, self.nonfinite = codec, feedback, nonfinite
        self._layout, layers = _updates.flatten(like, "like")
        for i, x in enumerate(layers):
            label = self._layout.label("like", i)
            if not _arrays.is_float(x):
                raise DTypeError(
                    f"{label}: expected {_arrays.FLOATS}, got {_arrays.dtype_name(x)}; "
                    "leave integer buffers out of a compressed update"
                )
            if _arrays.device_of(x) != "cpu":
                raise DTypeError(
                    f"{label}: expected an array on the CPU, got {_arrays.device_of(x)}"
                )
        self.numel = sum(_arrays.numel(x) for x in layers)
        self.k = codec.count(self.numel)
        self.epoch = 0
        states = feedback.states if feedback else ()
        self.e = np.zeros(self.numel, np.float32) if "e" in states else None
        self.h = np.zeros(self.numel, np.float32) if "h" in states else None
        self._tensors = b""
        if tensor_table:
            names = ["" if key is None else str(key) for key in self._layout.keys]
            self._tensors = wire_writer.pack_tensors(names, [tuple(x.shape) for x in layers])

    def encode(self, update: Any, round: int = 0, seed: int = 0) -> Packet:
        """Compress one update and move the state on.

        Parameters
        ----------
        update : update
            Alike to the one given at construction; may be read-only or not contiguous.
        round, seed : int
            Written into the header; 0 to 2**64 - 1.

        Raises
        ------
        InvalidInputError, DTypeError
            The update cannot be used.
        NonFiniteError
            It holds a NaN or an infinity, or overflows together with the state.

        In each case the state is unchanged.
        """
        layers = self._layout.layers(update, "update")
        a, b = self.feedback.factors(self.k, self.numel) if self.feedback else (1.0, 1.0)
        flags = self.feedback.flags if self.feedback else 0
        try:
            data = sparsify(
                self._layout.build(layers),
                k=self.k,
                e=self.e,
                h=self.h,
                a=a,
                b=b,
                values=self.codec.values,
                index=self.codec.index_coding(self.numel),
                round=round,
                seed=seed,
                epoch=self.epoch,
                flags=flags,
                tensors=self._tensors,
            )
        except NonFiniteError:
            if self.nonfinite == "raise":
                raise
            return self._empty_packet(round, seed, flags | wire.FLAG_NONFINITE)
        self.epoch = (self.epoch + 1) % 2**32
        return Packet(data, trusted=True)

    def _empty_packet(self, round: int, seed: int, flags: int) -> Packet:
        data = wire_writer.build(
            np.empty(0, np.int64),
            np.empty(0, np.uint32),
            numel=self.numel,
            values=self.codec.values,
            index="tile16",
            round=round,
            seed=seed,
            epoch=self.epoch,
            flags=flags,
            tensors=self._tensors,
        )
        return Packet(np.frombuffer(data, np.uint8), trusted=True)

    # ---- state ---------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything: e, h and epoch become 0."""
        for state in (self.e, self.h):
            if state is not None:
                state.fill(0)
        self.epoch = 0

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: NumPy arrays "e" and "h" where kept, and plain values.

        An encoder that loads it goes on bit for bit. Codec and `like` are not part of it.
        """
        return {
            name: value.copy() if isinstance(value, np.ndarray) else value
            for name, value in self._state().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned, epoch included.

        Raises
        ------
        InvalidInputError
            It belongs to another error control or size, or holds values that are not finite; the
            encoder is unchanged.
        """
        mine = self._state()
        if state.keys() != mine.keys():
            raise InvalidInputError(f"state: expected the keys {sorted(mine)}, got {sorted(state)}")
        for name in ("feedback", "numel"):
            if state[name] != mine[name]:
                raise InvalidInputError(
                    f"state[{name!r}]: expected {mine[name]!r}, got {state[name]!r}"
                )
        epoch = int(state["epoch"])
        if not 0 <= epoch < 2**32:
            raise InvalidInputError(f"state['epoch']: expected 0 to 2**32 - 1, got {epoch}")
        arrays = {}
        for name in self.feedback.states if self.feedback else ():
            array = np.asarray(state[name])
            if array.dtype != np.float32 or array.shape != (self.numel,):
                raise InvalidInputError(
                    f"state[{name!r}]: expected float32 of shape ({self.numel},), "
                    f"got {array.dtype} of shape {array.shape}"
                )
            if not np.isfinite(array).all():
                raise InvalidInputError(f"state[{name!r}]: expected finite values")
            arrays[name] = array
        for name, array in arrays.items():
            np.copyto(getattr(self, name), array)
        self.epoch = epoch

    def _state(self) -> dict[str, Any]:
        names = self.feedback.states if self.feedback else ()
        return {
            "feedback": self.feedback.name if self.feedback else "none",
            "numel": self.numel,
            "epoch": self.epoch,
            **{name: getattr(self, name) for name in names},
        }
