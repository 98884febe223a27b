"""FedNova: updates are normalised by the local work behind them before they are averaged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flcore.aggregation import nova_normalizer, nova_weights
from flcore.algorithms.base import check_number
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import Arrivals, Client, LocalResult, LocalWork, Payload, Server
from flcore.errors import InvalidInputError

__all__ = ["FedNova"]


@dataclass(frozen=True, kw_only=True)
class FedNova(FedAvg):
    r"""Normalised averaging (Wang et al., NeurIPS 2020, arXiv 2007.07481).

    A client that takes :math:`\tau_i` local steps reports :math:`A_i`, the sum of the coefficients
    with which its gradients enter :math:`u_i`, in units of the learning rate,

    .. math::
        \text{plain: } A_i = \tau_i, \qquad
        \text{momentum } \rho: \; \sum_{k=1}^{\tau_i} \frac{1 - \rho^k}{1 - \rho}, \qquad
        \text{proximal } \mu: \; \frac{1 - (1 - \eta\mu)^{\tau_i}}{\eta\mu} ,

    and the server takes, with :math:`p_i = n_i / \sum_{S_t} n_j`,

    .. math::
        D = \sum_{S_t} \frac{\tau_{eff}}{A_i} p_i u_i, \qquad
        b \leftarrow \gamma b + D / \eta, \qquad w^{t+1} = w^t + \eta_g \eta b ,

    :math:`\tau_{eff} = \sum_i p_i A_i`, or :math:`\sum_i p_i \tau_i` with a proximal term.

    Parameters
    ----------
    local_momentum : float
        :math:`\rho`.
    mu : float
        Coefficient of :math:`\mu (x - w^t)` in every local step.
    server_momentum : float
        :math:`\gamma`; 0: :math:`w^{t+1} = w^t + \eta_g D`.

    Raises
    ------
    InvalidInputError
        Also for `mu` together with `local_momentum`: the authors' code counts such steps by neither
        of the paper's formulas.

    Notes
    -----
    Statistics of the model (of BatchNorm) are averaged without the normalisation's scale.
    """

    name: ClassVar[str] = "fednova"

    mu: float = 0.0
    server_momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("mu", self.mu, lambda v: v >= 0, "a number from 0")
        check_number(
            "server_momentum", self.server_momentum, lambda v: 0 <= v < 1, "a number from 0 below 1"
        )
        if self.mu and self.local_momentum:
            raise InvalidInputError(
                f"mu: expected 0 together with local_momentum={self.local_momentum!r}, got "
                f"{self.mu!r}; FedNova has a normaliser for either, not for both"
            )
        if self.mu * self.local_lr > 1:
            raise InvalidInputError(
                f"mu: expected at most 1 / local_lr = {1 / self.local_lr!r}, got {self.mu!r}"
            )

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Start from w, with the proximal term outside clip and momentum."""
        work = super().client_begin(payload, client)
        return replace(work, spec=replace(work.spec, pull=self.mu, anchor=work.start))

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Send u_i, A_i and the number of steps."""
        a = nova_normalizer(
            result.steps, momentum=self.local_momentum, proximal=self.mu, lr=result.lr
        )
        payload = super().client_end(result, client)
        return payload | {"normalizer": float(a), "steps": result.steps}

    def weights(self, arrivals: Arrivals) -> list[float]:
        """Give ``n_i tau_eff / A_i``, whose sum is not that of the n_i."""
        plain = super().weights(arrivals)
        q = nova_weights(
            plain,
            [a["normalizer"] for a in arrivals],
            [a["steps"] for a in arrivals] if self.mu else None,
        )
        return (q * sum(plain)).tolist()

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Undo the mean's division by the sum of the weights, and move with momentum."""
        direction = sum(self.weights(arrivals)) / sum(super().weights(arrivals)) * mean
        if self.server_momentum:
            lr = self.lr(server.round)
            if "momentum" in server.state:
                direction = direction + self.server_momentum * lr * server["momentum"]
            server["momentum"] = direction / lr
        still = server.layout.statistics
        direction[still] = mean[still]
        self.move(server, direction, self.server_lr)
