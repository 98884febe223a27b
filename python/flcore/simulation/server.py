"""The server: sums messages as they come and moves the global model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from flcore.aggregation import Accumulator
from flcore.algorithms.base import Algorithm, Parameters
from flcore.ops import combine
from flcore.simulation.settings import Settings

__all__ = ["Server"]


class Server:
    """Global model, control vector, and the step that changes them.

    Without server control the direction is the weighted mean of the updates present,

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
    model : dict of float32 arrays
        The first global model.
    settings : Settings
    total_weight : float
        Sum of the weights of all clients, present or not.

    Attributes
    ----------
    model : dict of float32 arrays
    control : dict of float32 arrays, or None
        H; None unless the error control is EControl or EF21.
    """

    def __init__(
        self, algorithm: Algorithm, model: Parameters, settings: Settings, total_weight: float
    ) -> None:
        self._algorithm = algorithm
        self._settings = settings
        self._total_weight = total_weight
        self.model = model
        self.control: Parameters | None = None
        if settings.controls_server:
            self.control = {name: np.zeros_like(value) for name, value in model.items()}

    def step(self, updates: Iterable[tuple[Any, float]], round: int) -> None:
        """Take the updates of `round`, each with its weight, one after another.

        A packet is added without making a dense copy of it, and is not kept.

        Raises
        ------
        NonFiniteError
            If an update or the sum is not finite.
        """
        total = Accumulator(self.model, dtype=self._settings.accumulate)
        for update, weight in updates:
            total.add(update, weight)
        self.model = self._algorithm.server_step(self.model, self._direction(total, round))

    def _direction(self, total: Accumulator, round: int) -> Parameters:
        if self.control is None:
            return total.result()
        before = self.control
        now, last = (self._algorithm.client_begin(t).lr for t in (round, max(round - 1, 0)))
        if now != last:
            before = combine([before], [now / last])
        self.control = combine([before, total.result(divisor=self._total_weight)], [1.0, 1.0])
        if self._settings.control_step == "paper":
            return self.control
        return combine([before, total.result()], [1.0, 1.0])
