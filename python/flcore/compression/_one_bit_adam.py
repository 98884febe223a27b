"""1-bit Adam: Adam for a while, then its momentum in one bit a coordinate, both ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flcore import _arrays, _updates
from flcore.compression._client_state import check_layer, flat_float32, read_array, unflatten
from flcore.compression._codec import Codec
from flcore.compression._encoder import Encoder
from flcore.compression._feedback import EF14, Factors, Feedback
from flcore.compression._floats import Dense
from flcore.compression._linear import Sign
from flcore.compression._packet import Packet
from flcore.errors import InvalidInputError, NonFiniteError, PacketError
from flcore.ops.decode import ParsedPacket, decode_add_into, decode_into
from flcore.reference import wire

__all__ = ["OneBitAdam", "OneBitServer"]


@dataclass(frozen=True)
class _MomentumEF14(Feedback):
    """Error feedback on a running mean: ``v <- beta v + (1 - beta) g``, ``D = C(e + v)``."""

    beta: float = 0.9
    name: ClassVar[str] = "momentum_ef14"
    states: ClassVar[tuple[str, ...]] = ("e", "v")

    def factors(self, codec: Codec, numel: int, epoch: int) -> Factors:
        return Factors(p=self.beta, q=1.0 - self.beta)


class OneBitAdam:
    r"""A worker's end of 1-bit Adam; `OneBitServer` is the other.

    Every step, each worker sends `message` of its gradient, the server answers all workers with one
    packet, and `apply` takes the step. For the first `freeze_step` steps packets are dense float32
    gradients g, their mean \bar g, and the step is Adam's::

        m <- beta_1 m + (1 - beta_1) \bar g,   v <- beta_2 v + (1 - beta_2) \bar g^2
        x <- x - lr (m / (sqrt(v) + eps) + weight_decay x)

    Then v stays as it is, at least `floor` times its mean, and error feedback carries the momentum,
    ``m_i = beta_1 m + (1 - beta_1) g_i`` of each worker, through `codec` in both directions; what
    the server sends is the new m of all. A coordinate whose v is 0 by then has never had a
    gradient; its momentum is held at 0, as a sign has no code for that.

    All arithmetic is float32, elementwise: workers that start from the same parameters hold the
    same bits after every step. A worker that did not send can still `apply`.

    Parameters
    ----------
    params : update
        Initial parameters x, floating arrays on the CPU; copied, in float32.
    freeze_step : int
        Dense steps, 1 or more: until v changes slowly; 15 to 25 % of all is usual.
    lr : float
        Step; a public attribute that may change between steps.
    betas : (float, float)
        Decay of m and v, in [0, 1).
    eps, weight_decay : float
        As in the step above.
    floor : float
        The frozen v is raised to this part of its mean over the coordinates that it is not 0 at:
        without it, a coordinate that had tiny gradients so far is moved by huge steps.
    codec : codec, optional
        Of momenta, `Sign()` by default: the mean magnitude of a bucket is its scale, for which
        the error contracts; with ``Sign(scale="l2")`` as published it does not for heavy tails.
    client : int, optional
        Number of the worker, mixed into the seed.

    Attributes
    ----------
    step : int
        Steps taken.

    Notes
    -----
    16 bytes a coordinate between steps (x, m, v, e), and 8 more while encoding. A message is
    4 bytes a coordinate at first, then one bit. No bias correction, as published.

    References
    ----------
    Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence
    Speed", ICML 2021, arXiv 2102.02888.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import OneBitAdam, OneBitServer
    >>> target, start = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
    >>> workers = [OneBitAdam(start, freeze_step=20, lr=0.1, client=i) for i in range(2)]
    >>> server = OneBitServer(start, freeze_step=20)
    >>> for _ in range(200):
    ...     reply = server.reduce([w.message(w.params - target) for w in workers])
    ...     xs = [w.apply(reply) for w in workers]
    >>> bool(np.abs(xs[0] - target).max() < 0.5), bool((xs[0] == xs[1]).all())
    (True, True)
    """

    def __init__(
        self,
        params: Any,
        *,
        freeze_step: int,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        floor: float = 1e-4,
        codec: Codec | None = None,
        client: int | None = None,
    ) -> None:
        self.freeze_step = _steps(freeze_step)
        for name, value, top in (
            ("lr", lr, math.inf),
            ("eps", eps, math.inf),
            ("weight_decay", weight_decay, math.inf),
            ("floor", floor, 1.0),
            ("betas[0]", betas[0], 1.0),
            ("betas[1]", betas[1], 1.0),
        ):
            if not (isinstance(value, int | float) and 0 <= value < top):
                raise InvalidInputError(f"{name}: expected 0 <= {name} < {top}, got {value!r}")
        self.lr, self.betas, self.eps = float(lr), (float(betas[0]), float(betas[1])), float(eps)
        self.weight_decay, self.floor, self.step = float(weight_decay), float(floor), 0
        self._layout, layers = _updates.flatten(params, "params")
        for i, x in enumerate(layers):
            check_layer(x, self._layout.label("params", i))
        self._like = [_arrays.empty_like(x) for x in layers]
        self._x = flat_float32(layers)
        if not np.isfinite(self._x).all():
            raise NonFiniteError("params: expected finite float32 values")
        self._v = np.zeros_like(self._x)
        self._limits = wire.Limits(max_numel=max(self._x.size, 1))
        feedback = _MomentumEF14(self.betas[0])
        self._encoder = Encoder(codec or Sign(), feedback, like=params, client=client)
        self._plain = Encoder(Dense("float32"), like=params)

    @property
    def params(self) -> Any:
        """Parameters x, a copy, of the structure and dtypes that they were given in."""
        return unflatten(self._layout, [_arrays.empty_like(x) for x in self._like], self._x)

    @property
    def m(self) -> np.ndarray:
        """Momentum, (d,) float32: common to all workers after `apply`, own after `message`."""
        assert self._encoder.v is not None
        return self._encoder.v

    @property
    def v(self) -> np.ndarray:
        """Second moment, (d,) float32; as it was before `floor`."""
        return self._v

    @property
    def e(self) -> np.ndarray:
        """What was not sent yet, (d,) float32."""
        assert self._encoder.e is not None
        return self._encoder.e

    def message(self, gradient: Any, seed: int = 0) -> Packet:
        """Return what to send for a gradient like the parameters; once a step.

        The round in its header is the number of the step. Raises as `Encoder.encode`; nothing has
        changed then.
        """
        encoder = self._plain if self.step < self.freeze_step else self._encoder
        return encoder.encode(gradient, round=self.step, seed=seed)

    def apply(self, packet: Any) -> Any:
        """Take the step that the server's packet says, and return the new parameters.

        Raises
        ------
        PacketError
            The bytes are not a packet, of another size, or of another step than is due.
        NonFiniteError
            The new parameters are not finite.

        In each case nothing has changed.
        """
        sent = np.empty_like(self._x)
        decode_into(_of_step(packet, self.step, self._x.size, self._limits), [sent])
        b1, b2 = (np.float32(beta) for beta in self.betas)
        with np.errstate(over="ignore", invalid="ignore"):
            if self.step < self.freeze_step:
                m = b1 * self.m + (1 - b1) * sent
                v = floored = b2 * self._v + (1 - b2) * (sent * sent)
            else:
                v = self._v
                alive = v > 0
                m = np.where(alive, sent, np.float32(0))
                least = self.floor * v.mean(dtype=np.float64, where=alive) if alive.any() else 0.0
                floored = np.maximum(v, np.float32(least))
            pull = m / (np.sqrt(floored) + np.float32(self.eps))
            if self.eps == 0:
                pull[m == 0] = 0
            x = self._x - np.float32(self.lr) * (pull + np.float32(self.weight_decay) * self._x)
        if not (np.isfinite(x).all() and np.isfinite(v).all()):
            raise NonFiniteError(f"step {self.step}: the new parameters are not finite")
        np.copyto(self.m, m)
        self._x, self._v = x, v
        self.step += 1
        return self.params

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: "x", "second", the encoder's, and "step"."""
        return self._encoder.state_dict() | {
            "x": self._x.copy(),
            "second": self._v.copy(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; raises as `Encoder.load_state_dict`."""
        new = [read_array(state, k, self._x.dtype, self._x.shape) for k in ("x", "second")]
        step = _steps(state.get("step"), "state['step']", 0)
        extra = ("x", "second", "step")
        self._encoder.load_state_dict({k: x for k, x in state.items() if k not in extra})
        self._x, self._v = (array.copy() for array in new)
        self.step = step


class OneBitServer:
    """The server's end of `OneBitAdam`: the mean of the messages, compressed with error feedback.

    Parameters
    ----------
    like : update
        Like the parameters.
    freeze_step, codec
        As at the workers.

    Attributes
    ----------
    step : int
        Steps answered.
    """

    def __init__(self, like: Any, *, freeze_step: int, codec: Codec | None = None) -> None:
        self.freeze_step, self.step = _steps(freeze_step), 0
        self._layout, layers = _updates.flatten(like, "like")
        for i, x in enumerate(layers):
            check_layer(x, self._layout.label("like", i))
        numel = sum(_arrays.numel(x) for x in layers)
        flat = np.zeros(numel, np.float32)
        self._limits = wire.Limits(max_numel=max(numel, 1))
        self._encoder = Encoder(codec or Sign(), EF14(), like=flat)
        self._plain = Encoder(Dense("float32"), like=flat)

    @property
    def e(self) -> np.ndarray:
        """What was not sent back yet, (d,) float32."""
        assert self._encoder.e is not None
        return self._encoder.e

    def reduce(
        self, packets: Sequence[Any], weights: Sequence[float] | None = None, seed: int = 0
    ) -> Packet:
        """Return the answer to the messages of one step, for all workers.

        Parameters
        ----------
        packets : sequence of Packet or bytes
            Of the workers that take part in this step, at least one.
        weights : numbers >= 0, optional
            Equal by default; scaled to a sum of 1.
        seed : int
            For codecs that draw random numbers.

        Raises
        ------
        PacketError
            A packet is not right, or of another step than is due.
        InvalidInputError
            No packets, or weights that cannot be used.

        In each case nothing has changed.
        """
        if not packets:
            raise InvalidInputError("packets: expected at least one, got none")
        numel = self._encoder.numel
        parsed = [_of_step(p, self.step, numel, self._limits) for p in packets]
        ones = [1.0] * len(parsed) if weights is None else weights
        share = _updates.parse_weights(ones, len(parsed), signed=False)
        total = math.fsum(share)
        mean = np.zeros(numel, np.float32)
        decode_add_into(parsed, [w / total for w in share], [mean])
        encoder = self._plain if self.step < self.freeze_step else self._encoder
        packet = encoder.encode(mean, round=self.step, seed=seed)
        self.step += 1
        return packet

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state, as `Encoder.state_dict`, and "step"."""
        return self._encoder.state_dict() | {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; raises as `Encoder.load_state_dict`."""
        step = _steps(state.get("step"), "state['step']", 0)
        self._encoder.load_state_dict({k: x for k, x in state.items() if k != "step"})
        self.step = step


def _of_step(packet: Any, step: int, numel: int, limits: wire.Limits) -> ParsedPacket:
    parsed = packet if isinstance(packet, ParsedPacket) else Packet.from_bytes(packet, limits)
    header = parsed.header
    for what, got, expected in (("values", header.numel, numel), ("step", header.round, step)):
        if got != expected:
            raise PacketError(f"packet: {what}: expected {expected}, got {got}")
    return parsed


def _steps(value: Any, name: str = "freeze_step", least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInputError(f"{name}: expected a whole number from {least}, got {value!r}")
    return value
