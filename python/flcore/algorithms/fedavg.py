"""FedAvg: local SGD on a few clients, then a weighted mean of their updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flcore.algorithms.base import Algorithm
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import Arrivals, Client, LocalResult, LocalWork, Payload, Server

__all__ = ["FedAvg"]


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    r"""Federated averaging (McMahan et al., AISTATS 2017, arXiv 1602.05629).

    In round t every participant i of :math:`S_t` starts from the global model, :math:`x = w^t`,
    and takes :math:`K_i = E \lceil n_i / B \rceil` steps of plain SGD with a fresh optimiser,

    .. math::
        g &= \nabla f_i(x; \text{batch}), \qquad g \leftarrow g \min(1, c / \|g\|) \\
        x &\leftarrow x - \eta_0 \lambda^t (g + \omega x)

    and sends :math:`u_i = x - w^t`.  It keeps nothing between rounds.  The server takes

    .. math::
        w^{t+1} = w^t + \eta_g \sum_{i \in S_t} p_i u_i, \qquad
        p_i = n_i / \sum_{j \in S_t} n_j \;\text{ or }\; 1 / |S_t| .

    Parameters
    ----------
    local_lr, lr_decay : float
        :math:`\eta_0` and its factor per round :math:`\lambda`.
    local_epochs, batch_size : int
        E and B.
    weight_decay : float
        :math:`\omega`, applied after clipping.
    clip : float or None
        c, on the norm over all parameters together.
    server_lr : float
        :math:`\eta_g`.
    weighting : {"examples", "uniform"}
        The first or the second form of :math:`p_i`.

    Notes
    -----
    Clipping and decay follow the FL-Simulator code base, which much published work on client
    drift was run with; ``clip=None, weight_decay=0, lr_decay=1`` is the algorithm of the paper.

    Examples
    --------
    >>> FedAvg(local_lr=0.1, lr_decay=0.5).lr(round=1)
    0.05
    """

    name: ClassVar[str] = "fedavg"

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Start from the global model and take plain SGD steps."""
        return LocalWork(self.start(payload, client), self.spec(client.round))

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Send u_i."""
        return {"update": self.sent(result, client)}

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Take ``w + server_lr * mean``."""
        self.move(server, mean, self.server_lr)
