"""The client's end: an encoder that keeps the state of the error control between rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from flcore import _arrays, _updates
from flcore._state import State
from flcore.compression._client_state import (
    WORD,
    check_layer,
    empty_packet,
    flat_float32,
    mix_seed,
    read_memory,
    read_state,
    scale_factor,
    to_bfloat16,
)
from flcore.compression._codec import Codec, Job
from flcore.compression._feedback import Factors, Feedback
from flcore.compression._floats import Dense
from flcore.compression._packet import Packet
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.reference import feedback as reference
from flcore.reference import wire, wire_writer

__all__ = ["Encoder"]

STATE_DTYPES = {"float32": np.float32, "bfloat16": np.uint16}
_DENSE = Dense("float32")


class Encoder:
    """Compress the updates of one client into packets.

    Parameters
    ----------
    codec : codec
        What is sent, and how.
    feedback : EF14, EF21, EControl, DGC or None
        What is remembered of the rest.
    like : update
        An array, or a list, tuple or dict of arrays of float64, float32, float16 or bfloat16 on the
        CPU; every update must be alike in structure, shapes and dtypes. Only read for those.
    nonfinite : {"raise", "skip"}
        What a NaN or an infinity in an update does: raise, or send an empty packet with the
        non-finite flag set (a sparse one without entries, whatever the codec, which decodes to
        zeros). The state is unchanged either way.
    tensor_table : bool
        Write names (as hashes) and shapes of the layers into every packet, 64 bytes a layer.
    client : int, optional
        Number of this client, mixed into the seed of every packet, so that clients that are given
        one seed round independently. Codecs whose packets are summed before they are decoded share
        the seed as it is.
    start : {"zero", "dense"}
        First estimate h of `EControl` and `EF21`: 0, or the first update itself, which then goes
        out as a dense float32 packet with the resync flag. "zero" costs a few rounds in which H is
        still small, "dense" 4 bytes a coordinate once.
    state_dtype : {"float32", "bfloat16"}
        Type of e and v; h, which both sides must agree on, is always float32. bfloat16 is rounded
        stochastically with random numbers of the packet's seed and round: give a new round to every
        call.
    in_place : bool
        Keep no second copy of the state. A call that fails must leave the state as it was, which
        takes either that copy or a pass over the update and the state that only looks for values
        that are not finite: 4 to 8 bytes a coordinate less memory for one more reading pass.

    Attributes
    ----------
    numel : int
        Number of coordinates d of an update.
    epoch : int
        Packets that this state has produced: 0 for fresh state, and written into every packet. A
        server that counts the packets it took from a client finds, by comparing the two, lost and
        repeated packets (the counts differ) and clients that lost their state (0 again) or took an
        old one (a smaller count): see `ControlledSum`. Skipped updates do not change the state and
        do not count. Counts modulo 2**32.

    Notes
    -----
    State: 4 bytes a coordinate for each vector kept, twice that for e and v (and for h with a codec
    that sends every coordinate) unless `in_place`. Calls must not overlap in time.

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
        codec: Codec,
        feedback: Feedback | None = None,
        *,
        like: Any,
        nonfinite: str = "raise",
        tensor_table: bool = False,
        client: int | None = None,
        start: str = "zero",
        state_dtype: str = "float32",
        in_place: bool = False,
    ) -> None:
        if not isinstance(codec, Codec):
            raise DTypeError(f"codec: expected a codec such as TopK, got {type(codec).__name__}")
        if feedback is not None and not isinstance(feedback, Feedback):
            raise DTypeError(
                "feedback: expected an error control such as EF14 or EControl, or None, got "
                f"{type(feedback).__name__}"
            )
        if feedback is not None and not codec.takes_feedback:
            raise InvalidInputError(
                f"feedback: expected None with {type(codec).__name__}, got {feedback!r}"
            )
        for name, value, known in (
            ("nonfinite", nonfinite, ("raise", "skip")),
            ("start", start, ("zero", "dense")),
            ("state_dtype", state_dtype, tuple(STATE_DTYPES)),
        ):
            if value not in known:
                raise InvalidInputError(f"{name}: expected {' or '.join(known)}, got {value!r}")
        kept = feedback.kept if feedback else ()
        if start == "dense" and "h" not in kept:
            raise InvalidInputError(
                "start: 'dense' sets the estimate h, which only EControl and EF21 keep"
            )
        if client is not None and (
            isinstance(client, bool) or not isinstance(client, int) or not 0 <= client <= WORD
        ):
            raise InvalidInputError(f"client: expected an integer from 0 below 2**64, got {client}")
        self.codec, self.feedback, self.nonfinite = codec, feedback, nonfinite
        self.client, self.start, self.in_place = client, start, in_place
        self._layout, layers = _updates.flatten(like, "like")
        for i, x in enumerate(layers):
            check_layer(x, self._layout.label("like", i))
        self._shapes = tuple(tuple(x.shape) for x in layers)
        codec.check(self._shapes)
        self.numel = sum(_arrays.numel(x) for x in layers)
        if feedback is not None:
            feedback.factors(codec, self.numel, 0)
        self.epoch = 0
        dtypes = {name: STATE_DTYPES[state_dtype] for name in ("e", "v")} | {"h": np.float32}
        self._state = State()
        for name in kept:
            setattr(self._state, name, np.zeros(self.numel, dtypes[name]))
        self._memory: dict[str, dict[str, Any]] = {}
        self._tensors = b""
        if tensor_table:
            names = ["" if key is None else str(key) for key in self._layout.keys]
            self._tensors = wire_writer.pack_tensors(names, list(self._shapes))

    @property
    def e(self) -> np.ndarray | None:
        """What was not sent yet, (d,) float32; None where the error control keeps none.

        The array itself, good until the next call, or a copy of bfloat16 state; so is v.
        """
        return None if self._state.e is None else reference.from_state(self._state.e)

    @property
    def h(self) -> np.ndarray | None:
        """What the server believes this client's update to be, (d,) float32, or None."""
        return self._state.h

    @property
    def v(self) -> np.ndarray | None:
        """Momentum, (d,) float32, or None."""
        return None if self._state.v is None else reference.from_state(self._state.v)

    @property
    def k(self) -> int:
        """Number of entries that a packet holds: all d unless the codec selects."""
        entries = getattr(self.codec, "entries", None)
        return self.numel if entries is None else int(entries(self._shapes))

    # ---- packets -------------------------------------------------------------------------------

    def encode(
        self,
        update: Any,
        round: int = 0,
        seed: int = 0,
        *,
        codec: Codec | None = None,
        norm: Any = None,
    ) -> Packet:
        """Compress one update and move the state on.

        Parameters
        ----------
        update : update
            Alike to the one given at construction; may be read-only or not contiguous.
        round, seed : int
            Written into the header (the seed with the client's number mixed in); 0 to 2**64 - 1.
        codec : codec, optional
            For this packet in the place of the encoder's own: another density while warming up,
            say. What codecs remember is kept apart by their names.
        norm : array, optional
            What the server answered to the norms of all clients, for codecs that agree on a scale
            before they encode; see :meth:`norm`.

        Raises
        ------
        InvalidInputError, DTypeError
            The update cannot be used.
        NonFiniteError
            It holds a NaN or an infinity, or overflows together with the state.

        In each case the state is unchanged.
        """
        used = self.codec if codec is None else codec
        if self.start == "dense" and self.epoch == 0:
            used = _DENSE
        job = self._job(update, round, seed, used, norm)
        try:
            data = used.encode(job)
        except NonFiniteError:
            if self.nonfinite == "raise":
                raise
            return Packet(empty_packet(job), trusted=True)
        if job.memory:
            self._memory[used.name] = job.memory
        self.epoch = (self.epoch + 1) % 2**32
        return Packet(data, trusted=True)

    def norm(self, update: Any, round: int = 0, seed: int = 0) -> np.ndarray:
        """Return what a codec that agrees on a scale sends ahead of the packet; changes nothing.

        Raises
        ------
        InvalidInputError
            The codec needs no such agreement.
        """
        find = getattr(self.codec, "norm", None)
        if find is None:
            raise InvalidInputError(f"codec: {type(self.codec).__name__} has no norm to agree on")
        return find(self._job(update, round, seed, self.codec, None))

    def resync(self, round: int = 0, seed: int = 0) -> Packet:
        """Return h as a dense float32 packet with the resync flag; the state is unchanged.

        It stands for all packets so far, and replaces what a receiver that lost count has: see
        `ControlledSum` and `Replica`. Its epoch is that of the last of them, modulo 2**32.

        Raises
        ------
        InvalidInputError
            The error control keeps no h: there is nothing that a receiver could lose.
        """
        if self._state.h is None:
            raise InvalidInputError("resync: only EControl and EF21 keep an h to send")
        epoch = (self.epoch - 1) % 2**32
        job = self._make_job(self._state.h, State(), _DENSE, wire.FLAG_RESYNC, round, seed, epoch)
        return Packet(_DENSE.encode(job), trusted=True)

    def _job(self, update: Any, round: int, seed: int, codec: Codec, norm: Any) -> Job:
        """Check an update and set the state up for it."""
        if not isinstance(codec, Codec):
            raise DTypeError(f"codec: expected a codec such as TopK, got {type(codec).__name__}")
        if codec is not self.codec:
            codec.check(self._shapes)
        update = self._layout.build(self._layout.layers(update, "update"))
        state, flags, factors = self._state, 0, Factors()
        if codec is _DENSE:
            flags = wire.FLAG_RESYNC
        elif self.feedback is not None:
            flags = self.feedback.flags
            factors = self.feedback.factors(codec, self.numel, self.epoch)
        state.a, state.b, state.p, state.q, state.mask = factors
        if not codec.dense_state:
            state.spare.pop("h", None)
        if not self.in_place and codec.needs_spares(self._memory.get(codec.name, {})):
            for name, x in state.buffers().items():
                if name not in state.spare and (name != "h" or codec.dense_state):
                    state.spare[name] = np.empty_like(x)
        job = self._make_job(update, state, codec, flags, round, seed, self.epoch)
        return job if norm is None else replace(job, options={"norm": norm})

    def _make_job(
        self, update: Any, state: State, codec: Codec, flags: int, round: int, seed: int, epoch: int
    ) -> Job:
        for name, number in (("round", round), ("seed", seed)):
            if isinstance(number, bool) or not 0 <= number <= WORD:
                raise InvalidInputError(f"{name}: expected 0 <= {name} < 2**64, got {number}")
        if self.client is not None and not codec.shared_seed:
            seed = mix_seed(seed, self.client)
        return Job(
            update=update,
            shapes=self._shapes,
            numel=self.numel,
            state=state,
            memory=dict(self._memory.get(codec.name, {})),
            round=round,
            seed=seed,
            epoch=epoch,
            flags=flags,
            tensors=self._tensors,
            client=self.client or 0,
        )

    # ---- state ---------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything: e, h, v, what the codec remembers, and epoch become 0."""
        for x in self._state.buffers().values():
            x.fill(0)
        self._memory = {}
        self.epoch = 0

    def start_at(self, values: Any) -> None:
        """Start anew with an estimate h that the receiver has too, such as the first global model.

        Parameters
        ----------
        values : update
            Alike to the updates; rounded to float32. The receiver must start from the same.

        Raises
        ------
        InvalidInputError, DTypeError
            The error control keeps no h, or the values do not fit or are not finite.
        """
        if self._state.h is None:
            raise InvalidInputError("start_at: only EControl and EF21 keep an h")
        flat = flat_float32(self._layout.layers(values, "values"))
        if not np.isfinite(flat).all():
            raise NonFiniteError("values: expected finite float32 values")
        self.reset()
        np.copyto(self._state.h, flat)

    def rescale(self, factor: float) -> None:
        """Multiply e, h and v by `factor`, rounded to float32.

        State lives in the units of an update. Where those change, because updates are the change
        of a model over local steps of another learning rate, the factor is new rate / old rate.
        A server that keeps H rescales it by the same factor (`ControlledSum.rescale`), once for all
        clients; a client that was away catches up with the product of what it missed. Its h and
        the server's record of it then differ by roundings, unless the factors are powers of two.

        Raises
        ------
        InvalidInputError
            `factor` is not a positive finite number, or some product is not finite; the state is
            unchanged.
        """
        scale = scale_factor(factor)
        new = {}
        for name, x in self._state.buffers().items():
            with np.errstate(over="ignore"):
                product = reference.from_state(x) * scale
            if not np.isfinite(product).all():
                raise NonFiniteError(f"factor: {name} times {factor} overflows float32")
            new[name] = product
        for name, product in new.items():
            x = getattr(self._state, name)
            np.copyto(x, product if x.dtype == np.float32 else to_bfloat16(product))

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: arrays "e", "h" and "v" where kept, and plain values.

        What the codec remembers is there as ``codec.<codec>.<name>``. bfloat16 arrays are their
        bits as uint16. An encoder that loads it goes on bit for bit. Settings and `like` are not
        part of it.
        """
        found = self._plain() | dict(self._state.buffers())
        for codec, memory in self._memory.items():
            found |= {f"codec.{codec}.{name}": value for name, value in memory.items()}
        return {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in found.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned, epoch included.

        Raises
        ------
        InvalidInputError
            It belongs to another error control or size, or holds values that are not finite; the
            encoder is unchanged.
        """
        epoch, arrays = read_state(state, self._plain(), self._state.buffers())
        memory = read_memory(state)
        for name, array in arrays.items():
            np.copyto(getattr(self._state, name), array)
        self._memory, self.epoch = memory, epoch

    def _plain(self) -> dict[str, Any]:
        return {
            "feedback": self.feedback.name if self.feedback else "none",
            "numel": self.numel,
            "epoch": self.epoch,
        }
