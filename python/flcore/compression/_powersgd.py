"""PowerSGD over rounds: clients send one factor that can be summed before anything is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _updates
from flcore._state import State
from flcore.compression._low_rank import check_rank
from flcore.compression._packet import Packet, _as_packet
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops import low_rank as ops
from flcore.ops._low_rank_packet import factors_of, pack_factors
from flcore.ops.combine import combine
from flcore.reference import wire_writer

__all__ = ["PowerSGD", "PowerSGDClient"]


class _Side:
    """What client and server share: the plan, the factor of the round, and whose turn it is."""

    def __init__(self, like: Any, rank: int, min_compression: float, seed: int) -> None:
        check_rank(rank, min_compression)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise InvalidInputError(f"seed: expected 0 <= seed < 2**64, got {seed!r}")
        self._layout, layers = _updates.flatten(like, "like")
        for i, x in enumerate(layers):
            if not _arrays.is_float(x) or _arrays.device_of(x) != "cpu":
                raise DTypeError(
                    f"{self._layout.label('like', i)}: expected {_arrays.FLOATS} on the CPU, "
                    f"got {_arrays.dtype_name(x)} on {_arrays.device_of(x)}"
                )
        shapes = [tuple(x.shape) for x in layers]
        self.plan = ops.Plan.of(shapes, ops.choose_ranks(shapes, rank, min_compression))
        self.rank, self.seed, self.round = rank, seed, 0
        self.numel = sum(self.plan.numel)
        self._tensors = wire_writer.pack_tensors([""] * len(shapes), shapes)
        self.factor = ops.orthonormalise(
            ops.revive(self.plan, None, seed, 0), plan=self.plan, columns=True
        )

    @property
    def back(self) -> bool:
        """Whether clients send ``U^T P`` this round, in odd rounds, and not ``U Q``."""
        return self.round % 2 == 1

    @property
    def message_size(self) -> int:
        """Numbers in a message of this round."""
        return (self.plan.q if self.back else self.plan.p) + self.plan.values

    def advance(self, p: np.ndarray, q: np.ndarray, round: int) -> None:
        """Take the factors of a round; the one that was sent, orthonormal, serves the next one."""
        back = round % 2 == 1
        sent = ops.revive(self.plan, q if back else p, self.seed, round + 1, columns=back)
        self.factor = ops.orthonormalise(sent, plan=self.plan, columns=back)
        self.round = round + 1


class PowerSGDClient(_Side):
    """Client of `PowerSGD`: keeps the residual E and sends one factor of U = G + E a round.

    Parameters
    ----------
    like, rank, min_compression, seed
        As for the server.
    error : {"common", "own"}
        What is taken from U: "common", what the server made of all messages (the residuals of all
        clients then sum to what the sum lacks), or "own", what this client's own message says,
        which suits rounds in which others take part.

    Attributes
    ----------
    e : (d,) float32
        The residual; the whole U between `message` and `settle` for the common error.
    """

    def __init__(
        self,
        like: Any,
        rank: int = 2,
        *,
        min_compression: float = 2.0,
        seed: int = 0,
        error: str = "common",
    ) -> None:
        super().__init__(like, rank, min_compression, seed)
        if error not in ("common", "own"):
            raise InvalidInputError(f"error: expected common or own, got {error!r}")
        self.error = error
        self._state = State(
            e=np.zeros(self.numel, np.float32), spare={"e": np.empty(self.numel, np.float32)}
        )
        self._waiting = False

    @property
    def e(self) -> np.ndarray:
        """The residual, (d,) float32."""
        assert self._state.e is not None
        return self._state.e

    def message(self, update: Any) -> np.ndarray:
        """Return the message of this round, float32 (message_size,), and keep the rest.

        Factor after factor, then the values of layers that are not compressed. Messages are linear
        in U = G + E: those of many clients may be averaged, or summed under secure aggregation.

        Raises
        ------
        InvalidInputError
            The update does not fit, or the round's message was made already.
        NonFiniteError
            A NaN, an infinity, or an overflow; nothing has changed.
        """
        if self._waiting:
            raise InvalidInputError(
                f"message: round {self.round} has one already; settle with the server's packet"
            )
        update = self._layout.build(self._layout.layers(update, "update"))
        product, values = ops.low_rank_half(
            update, plan=self.plan, factor=self.factor, back=self.back, state=self._state
        )
        if self.error == "own":
            self._subtract(product)
        self._waiting = True
        return np.concatenate([product, values])

    def settle(self, packet: Any) -> None:
        """Take the server's packet of the round: correct the residual and turn to the next round.

        A client that did not send a message in that round, or missed some rounds, takes the last
        packet only. If the packet it misses is the one of its own message, the common error keeps
        all of U, which is then sent twice.

        Raises
        ------
        PacketError, InvalidInputError
            Not a packet of the server, or of an earlier round; nothing has changed.
        """
        parsed = _as_packet(packet, "packet")
        round = parsed.header.round
        if round < self.round:
            raise InvalidInputError(
                f"packet: expected round {self.round} or a later one, got {round}"
            )
        p, q = factors_of(parsed, self.plan)
        if self._waiting and self.error == "common" and round == self.round:
            ops.low_rank_residual(self.e, plan=self.plan, p=p, q=q)
        self._waiting = False
        self.advance(p, q, round)

    def _subtract(self, product: np.ndarray) -> None:
        p, q = (self.factor, product) if self.back else (product, self.factor)
        ops.low_rank_residual(self.e, plan=self.plan, p=p, q=q)


class PowerSGD(_Side):
    """Server of the federated PowerSGD: half a power iteration a round, on sums of messages.

    With U_w = G_w + E_w of client w, and Q (even rounds) or P (odd rounds) orthonormal and known
    to all from the round before, clients send ``P_w = U_w Q`` or ``Q_w = U_w^T P``. Both are
    linear, so the server needs their mean only; the model moves by ``P Q^T``, the projection of the
    mean of all U, and the mean factor, made orthonormal, serves the next round.

    Parameters
    ----------
    like : update
        Gives the shapes of the layers.
    rank : int
        1 to 32.
    min_compression : float
        As for `LowRank`: other layers are sent as they are.
    seed : int
        Of the first factor; the same for all clients.

    References
    ----------
    Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization", NeurIPS 2019, arXiv 1905.13727.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import PowerSGD, PowerSGDClient, decode
    >>> x = np.outer(np.arange(1.0, 41.0), np.ones(30))
    >>> server, client = PowerSGD(x, rank=1), PowerSGDClient(x, rank=1)
    >>> for _ in range(2):
    ...     packet = server.step([client.message(x)])
    ...     client.settle(packet)
    >>> bool(np.allclose(decode(packet, like=x) + client.e.reshape(40, 30), 2 * x, rtol=0.7))
    True
    """

    def __init__(
        self, like: Any, rank: int = 2, *, min_compression: float = 2.0, seed: int = 0
    ) -> None:
        super().__init__(like, rank, min_compression, seed)

    def step(self, messages: Sequence[np.ndarray], weights: Any = None) -> Packet:
        """Return the packet of the round from the messages of the clients that took part.

        Parameters
        ----------
        messages : sequence of (message_size,) float32 arrays
            All of this round.
        weights : numbers, optional
            Non-negative, one a message; the mean is weighted by them.

        Returns
        -------
        Packet
            A low-rank packet: it decodes to the mean update, and clients settle with it.

        Raises
        ------
        InvalidInputError, DTypeError
            Messages or weights that cannot be used.
        NonFiniteError
            A message is not finite.

        In each case nothing has changed.
        """
        messages = [self._message(m, f"messages[{i}]") for i, m in enumerate(messages)]
        if not messages:
            raise InvalidInputError("messages: expected at least one, got none")
        if weights is None:
            weights = np.ones(len(messages))
        weights = np.array(_updates.parse_weights(weights, len(messages), signed=False))
        return self.step_mean(combine(messages, weights / weights.sum(), accumulate="float64"))

    def step_mean(self, mean: np.ndarray) -> Packet:
        """Return the packet of the round from the mean message: for sums made elsewhere.

        Parameters, errors and result as :meth:`step`.
        """
        mean = self._message(mean, "mean")
        if not np.isfinite(mean).all():
            raise NonFiniteError("mean: expected finite values")
        size = mean.size - self.plan.values
        product, values = mean[:size], mean[size:]
        p, q = (self.factor, product) if self.back else (product, self.factor)
        packet = Packet(
            pack_factors(
                self.plan, p, q, values, rank=self.rank, tensors=self._tensors, round=self.round,
                seed=self.seed,
            ),
        )  # fmt: skip
        self.advance(p, q, self.round)
        return packet

    def _message(self, x: Any, name: str) -> np.ndarray:
        if not isinstance(x, np.ndarray) or x.dtype != np.float32:
            got = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
            raise DTypeError(f"{name}: expected a float32 NumPy array, got {got}")
        if x.shape != (self.message_size,):
            raise InvalidInputError(
                f"{name}: expected {self.message_size} numbers in round {self.round}, "
                f"got shape {x.shape}"
            )
        return np.ascontiguousarray(x)
