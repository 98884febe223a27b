"""FedCM: every local step goes along the last global direction, too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flcore.algorithms.base import check_number
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import (
    Arrivals,
    Client,
    LocalResult,
    LocalWork,
    Payload,
    Server,
    shares,
)

__all__ = ["FedCM"]


@dataclass(frozen=True, kw_only=True)
class FedCM(FedAvg):
    r"""Client-level momentum (Xu et al., arXiv 2106.10874).

    The server keeps :math:`\Delta`, the mean gradient of a local step in the last round, 0 at
    first.  With :math:`K` local steps,

    .. math::
        x &\leftarrow x - \eta_t (\mathrm{clip}(\alpha g + (1 - \alpha) \Delta^t) + \omega x) \\
        w^{t+1} &= w^t + \eta_g \bar u, \qquad \Delta^{t+1} = -\bar u / (K \eta_t), \qquad
        \bar u = \frac{1}{S} \sum_{S_t} u_i .

    Clients keep nothing.

    Parameters
    ----------
    alpha : float
        Share of the fresh gradient; 1 is FedAvg.  The first rounds are slow: their gradients count
        alpha only.
    weighting : {"uniform", "examples"}
        Of the mean :math:`\bar u`.

    Notes
    -----
    Where clients differ in their number of steps, K is the weighted mean of what they report; the
    FL-Simulator code base computes it for client 0 and takes it for all.
    """

    name: ClassVar[str] = "fedcm"

    weighting: str = "uniform"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, lambda v: 0 < v <= 1, "a number above 0 up to 1")

    def server_begin(self, server: Server) -> None:
        """Start from Delta = 0."""
        server["direction"] = server.zeros()

    def downlink(self, server: Server, client: int) -> Payload:
        """Send w and Delta."""
        return super().downlink(server, client) | {"direction": server["direction"]}

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Mix gradients with Delta."""
        work = super().client_begin(payload, client)
        spec = self.spec(client.round, alpha=self.alpha, q=(1 - self.alpha) * payload["direction"])
        return replace(work, spec=spec)

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Send u_i and K_i."""
        return super().client_end(result, client) | {"steps": result.steps}

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Move w along the mean, which is the next Delta in units of a local step."""
        super().server_step(server, mean, arrivals)
        parts = zip(shares(self.weights(arrivals)), arrivals, strict=True)
        steps = sum(share * a["steps"] for share, a in parts)
        server["direction"] = mean / -(steps * self.lr(server.round))
