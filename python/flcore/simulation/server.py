"""The server's end of a round: messages become one direction as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore.aggregation import Accumulator
from flcore.algorithms.base import Algorithm
from flcore.algorithms.layout import Layout, Parameters, Vector
from flcore.algorithms.state import Arrival, Arrivals
from flcore.errors import InvalidInputError
from flcore.ops import combine
from flcore.simulation.settings import Settings

__all__ = ["Aggregator"]


class Aggregator:
    """Sums the updates of a round, dense or in packets, and keeps the control vector.

    Without server control the direction is the weighted mean of the updates present, or what a
    robust rule makes of them,

        direction = sum_{i in S} q_i D_i / sum_{i in S} q_i

    With EControl (Gao et al., ICLR 2024) and EF21 messages are changes of the clients' estimates
    h_i, and the server keeps their mean over all N clients; an absent client changes nothing, so
    the sum is divided by the weight of all clients, not of those present:

        H' = H + sum_{i in S} q_i D_i / sum_{i <= N} q_i

    With ``control_step="saga"`` the direction is the step that FedVARP (Jhunjhunwala et al., UAI
    2022, arXiv 2207.14130) takes with uncompressed updates, where h_i is the last update of i,

        direction = H + sum_{i in S} q_i D_i / sum_{i in S} q_i

    ``"paper"`` takes H' as EControl has it, in which the news of a round enters at S/N.  Where all
    clients take part the two are one.  With equal weights and S of N clients a round, the model
    with all that was not sent, ``x + c sum_{i <= N} e_i``, moves along ``H + c sum_{i in S} (u_i -
    h_i)``, u_i the update, with c = 1/S for saga and 1/N for the paper's step: only the first is,
    over who takes part, an unbiased estimate of the mean update.

    Both live in the units of an update, the change of the parameters in a round. When the local
    learning rate decays, H is scaled by the same factor as the h_i of the clients, which scale
    theirs when they come back.

    Parameters
    ----------
    algorithm : Algorithm
    layout : Layout
        Of the model; updates hold its shared tensors.
    settings : Settings
    total_weight : float
        Sum of the weights of all clients, present or not.

    Attributes
    ----------
    control : dict of float32 arrays, or None
        H; None unless the error control is EControl or EF21.
    rule : rule of `flcore.aggregation`, or None
        What takes the place of the mean.
    """

    def __init__(
        self, algorithm: Algorithm, layout: Layout, settings: Settings, total_weight: float
    ) -> None:
        self._algorithm = algorithm
        self._settings = settings
        self._total_weight = total_weight
        self.rule = settings.aggregation
        self.like: Parameters = {
            name: np.zeros(layout.shapes[name], np.float32) for name in layout.names()
        }
        self.control: Parameters | None = None
        if settings.controls_server:
            self.control = {name: np.zeros_like(value) for name, value in self.like.items()}

    def receive(self, arrivals: Sequence[Arrival], round: int) -> Arrivals:
        """Give the messages of `round` as an algorithm sees them."""
        return _Received(arrivals, self, round)

    def total(self, updates: Sequence[Any], weights: Sequence[float]) -> Accumulator:
        """Add up, one message after another: packets are added without a dense copy."""
        total = Accumulator(self.like, dtype=self._settings.accumulate)
        for update, weight in zip(updates, weights, strict=True):
            total.add(self._named(update), float(weight))
        return total

    def direction(self, updates: Sequence[Any], weights: Sequence[float], round: int) -> Parameters:
        """Give the direction of the class's description, and move H."""
        rule = self.rule
        if rule is not None:
            like = self.like if self._settings.codec is not None else None
            known = list(weights) if getattr(rule, "weighted", False) else None
            return rule([self._named(update) for update in updates], known, like=like)
        total = self.total(updates, weights)
        if self.control is None:
            return total.result()
        before = self.control
        now, last = (self._algorithm.lr(t) for t in (round, max(round - 1, 0)))
        if now != last:
            before = combine([before], [now / last])
        self.control = combine([before, total.result(divisor=self._total_weight)], [1.0, 1.0])
        if self._settings.control_step == "paper":
            return self.control
        return combine([before, total.result()], [1.0, 1.0])

    def _named(self, update: Any) -> Any:
        """Give what `Accumulator.add` takes: a packet, or arrays by name."""
        if not isinstance(update, np.ndarray):
            return update
        named, first = {}, 0
        for name, value in self.like.items():
            named[name] = update[first : first + value.size].reshape(value.shape)
            first += value.size
        return named


class _Received(Arrivals):
    """Messages whose updates the aggregator sums."""

    def __init__(self, arrivals: Sequence[Arrival], aggregator: Aggregator, round: int) -> None:
        super().__init__(arrivals)
        self._aggregator, self._round = aggregator, round

    def sum(self, weights: Sequence[float], name: str = "update") -> Vector:
        """Sum of the arrays called `name`, each times its weight."""
        if name != "update":
            return super().sum(weights, name)
        self._check_control()
        total = self._aggregator.total(*self.having(name, weights))
        return _vector(total.result(divisor=1.0))

    def mean(self, weights: Sequence[float], name: str = "update") -> Vector:
        """Weighted mean, or what the run's rule or error control makes of the updates."""
        if name != "update":
            return super().mean(weights, name)
        updates, weights = self.having(name, weights)
        if not updates:
            return _vector({n: np.zeros_like(v) for n, v in self._aggregator.like.items()})
        return _vector(self._aggregator.direction(updates, weights, self._round))

    def updates(self) -> list[Vector]:
        """Give the updates themselves."""
        self._check_control()
        if self._aggregator.rule is not None:
            raise InvalidInputError(
                "aggregation: this algorithm makes its own aggregate of single updates; leave "
                "the robust rule out"
            )
        return super().updates()

    def _check_control(self) -> None:
        if self._aggregator.control is not None:
            raise InvalidInputError(
                "feedback: this algorithm takes sums of the updates, and under EControl and EF21 "
                "messages are changes of what the server keeps; use EF14, or no error control"
            )


def _vector(named: Parameters) -> Vector:
    nothing = np.empty(0, np.float32)
    return np.concatenate([nothing, *(value.reshape(-1) for value in named.values())])
