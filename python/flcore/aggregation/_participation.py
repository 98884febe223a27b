"""Weights for clients that take part at unknown rates: FedAU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _updates
from flcore.aggregation._checks import check_keys, client_mask, number, whole
from flcore.aggregation._server_sum import client_count, server_sum
from flcore.errors import InvalidInputError
from flcore.ops.combine import combine

__all__ = ["ParticipationWeights", "fedau_step"]


def fedau_step(
    model: Any,
    updates: Any,
    weights: Sequence[float],
    num_clients: int,
    *,
    lr: float = 1.0,
    out: Any = None,
    accumulate: str = "float32",
    nonfinite: str = "raise",
    variant: str | None = None,
) -> Any:
    r"""Server step of FedAU, ``x + (lr / N) sum_n omega_n D_n`` over the participants.

    The divisor is the whole population N, **not** the number of participants: in expectation a
    client that takes part with probability p then counts ``p * omega = 1`` times.

    Parameters
    ----------
    model : update
        x; of the structure, shapes and dtypes of an update, floating layers only.
    updates : sequence of updates, or array of shape (n, ...)
        ``D_n``, local model minus x, one for each participant. Without any, x is copied.
    weights : (n,) numbers >= 0
        ``omega_n`` in the order of `updates`, from before this round; all 1 where the clients sent
        ``omega_n D_n``.
    num_clients : int
        N; clients that left for good still count.
    lr : float
        Global step eta, positive.
    out : update, optional
        Where the result goes; it may be `model`.
    accumulate, nonfinite, variant
        See `flcore.ops.combine`. "exclude" drops a client from the sum; N stays.

    Returns
    -------
    update
        The next model.

    Raises
    ------
    InvalidInputError, DTypeError, NonFiniteError, VariantUnavailableError
        See `flcore.ops.combine`; also more updates than clients.

    Notes
    -----
    A rare client's update is multiplied by up to K / N where K is the cutoff: clip updates before
    they come here if single clients must not move the model far.

    References
    ----------
    Wang, Ji, "A Lightweight Method for Tackling Unknown Participation Statistics in Federated
    Averaging", ICLR 2024, arXiv 2306.03401, Algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> fedau_step(np.zeros(2), [np.array([1.0, 2.0]), np.array([4.0, 0.0])], [3, 1], 10)
    array([0.7, 0.6])
    """
    population = whole("num_clients", num_clients, 1)
    step = number("lr", lr, 0.0, open="low") / population
    n = client_count(updates)
    if n > population:
        raise InvalidInputError(f"updates: expected at most {population} clients, got {n}")
    omega = _updates.parse_weights(weights, n, signed=True)
    if any(w < 0 for w in omega):
        raise InvalidInputError(f"weights: expected numbers >= 0, got {min(omega)}")
    if n == 0:
        return combine([model], [1.0], out=out, nonfinite="propagate", variant=variant)
    return server_sum(
        model,
        updates,
        lambda keep: [step * omega[i] if i in keep else 0.0 for i in range(n)],
        name="model",
        out=out,
        accumulate=accumulate,
        nonfinite=nonfinite,
        variant=variant,
    )


class ParticipationWeights:
    r"""Online estimates of 1 / (participation rate), one for each client of a population (FedAU).

    A client's weight is the mean length of the intervals between the rounds it took part in, each
    cut at K rounds; 1 while it has none. With S the open interval, M the number of closed ones, at
    the end of every round, for every client,

    .. math::
        S \leftarrow S + 1; \quad\text{if it took part or } S = K: \quad
        \omega \leftarrow (M \omega + S) / (M + 1),\; M \leftarrow M + 1,\; S \leftarrow 0 .

    Parameters
    ----------
    num_clients : int
        Size of the population, N. All its members are counted, those that never come too.
    cutoff : int, optional
        K, at least 1; None: no cutoff. A few times 1 / (smallest rate): a small K limits variance
        and leaves a bias, ``(1 - (1 - p)^K) / p`` in place of ``1 / p`` for rate p.

    Attributes
    ----------
    num_clients, cutoff
        As given.
    rounds : int
        Rounds recorded.

    Notes
    -----
    The closed intervals of a client add up to the round its last one closed in, so that round and
    M say everything: the mean is exact to one rounding, and a round costs only its participants
    (with a cutoff, one comparison for each client): 24 bytes a client.

    A client that never came has weight 1 until K rounds have passed, and K from then on.

    The state belongs into the checkpoint of the server; see `state_dict`.

    References
    ----------
    Wang, Ji, "A Lightweight Method for Tackling Unknown Participation Statistics in Federated
    Averaging", ICLR 2024, arXiv 2306.03401, Algorithm 2.

    Examples
    --------
    >>> participation = ParticipationWeights(3)
    >>> for clients in ([0], [0, 1], [0], [0, 1]):
    ...     _ = participation.update(clients)
    >>> participation.weights
    array([1., 2., 1.])
    """

    def __init__(self, num_clients: int, cutoff: int | None = None) -> None:
        self.num_clients = whole("num_clients", num_clients, 1)
        self.cutoff = None if cutoff is None else whole("cutoff", cutoff, 1)
        self.rounds = 0
        self._count = np.zeros(self.num_clients, np.int64)  # M
        self._closed = np.zeros(self.num_clients, np.int64)  # the round the last interval closed in
        self._weights = np.ones(self.num_clients)

    @property
    def weights(self) -> np.ndarray:
        """Weights in force, (N,) float64 from 1; a read-only view that `update` changes."""
        view = self._weights.view()
        view.flags.writeable = False
        return view

    @property
    def intervals(self) -> np.ndarray:
        """Number of closed intervals of each client, M; (N,) int64, a copy."""
        return self._count.copy()

    @property
    def open_intervals(self) -> np.ndarray:
        """Rounds since the last interval of each client closed, S; (N,) int64."""
        return self.rounds - self._closed

    def update(self, participated: Any) -> ParticipationWeights:
        """Record a round. The round itself is to be weighted with `weights` from before this call.

        Parameters
        ----------
        participated : (N,) bool mask, or indices
            Who took part; indices in any order, repeats count once, empty for nobody.

        Returns
        -------
        ParticipationWeights
            Itself.

        Raises
        ------
        InvalidInputError
            Shape or indices that cannot be used; nothing was recorded.
        """
        closing = client_mask("participated", participated, self.num_clients)
        self.rounds += 1
        if self.cutoff is not None:
            closing |= self._closed == self.rounds - self.cutoff
        clients = np.flatnonzero(closing)
        self._count[clients] += 1
        self._closed[clients] = self.rounds
        self._weights[clients] = self.rounds / self._count[clients]
        return self

    def step(self, model: Any, updates: Any, clients: Sequence[int], **options: Any) -> Any:
        """Take the server step of a round with the weights in force, then record the round.

        Parameters
        ----------
        model, updates
            See `fedau_step`.
        clients : (n,) indices
            Whose updates they are, in the order of `updates`, each once.
        **options
            `lr`, `out`, `accumulate`, `nonfinite`, `variant` of `fedau_step`.

        Returns
        -------
        update
            The next model.

        Raises
        ------
        InvalidInputError, DTypeError, NonFiniteError, VariantUnavailableError
            See `fedau_step`; nothing was recorded.
        """
        mask = client_mask("clients", clients, self.num_clients)
        order = np.asarray(clients)
        n = client_count(updates)
        if order.dtype == bool or not mask.sum() == order.size == n:
            raise InvalidInputError(
                f"clients: expected {n} different indices, one an update, got {clients!r}"
            )
        omega = self._weights[order.astype(np.int64)]
        result = fedau_step(model, updates, omega.tolist(), self.num_clients, **options)
        self.update(mask)
        return result

    # ---- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: "rounds", "cutoff", and int64 arrays "intervals", "closed".

        "closed" is the round in which the last interval of each client closed.
        """
        return {
            "rounds": self.rounds,
            "cutoff": self.cutoff,
            "intervals": self._count.copy(),
            "closed": self._closed.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that `state_dict` returned; what follows is the same bit for bit.

        Raises
        ------
        InvalidInputError
            It has another population or cutoff, or counts that cannot be; nothing was changed.
        """
        check_keys(state, {"rounds", "cutoff", "intervals", "closed"})
        rounds = whole("state['rounds']", state["rounds"], 0)
        if state["cutoff"] != self.cutoff:
            raise InvalidInputError(
                f"state['cutoff']: expected {self.cutoff}, got {state['cutoff']}"
            )
        count, closed = np.asarray(state["intervals"]), np.asarray(state["closed"])
        for name, array in (("intervals", count), ("closed", closed)):
            if array.dtype.kind not in "iu" or array.shape != (self.num_clients,):
                raise InvalidInputError(
                    f"state[{name!r}]: expected integers of shape ({self.num_clients},), "
                    f"got {array.dtype} of shape {array.shape}"
                )
        sound = (
            (count <= closed) & (closed <= rounds) & ((count > 0) == (closed > 0)) & (count >= 0)
        )
        if self.cutoff is not None:
            sound &= (rounds - closed < self.cutoff) & (closed <= count * self.cutoff)
        if not sound.all():
            i = int(np.flatnonzero(~sound)[0])
            raise InvalidInputError(
                f"state: client {i} cannot have {count[i]} intervals, the last closed in round "
                f"{closed[i]} of {rounds}"
            )
        self.rounds = rounds
        self._count[:] = count
        self._closed[:] = closed
        self._weights[:] = np.where(count > 0, closed / np.maximum(count, 1), 1.0)
