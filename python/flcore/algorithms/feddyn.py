"""FedDyn: every client's loss is tilted, so that local and global stationary points agree."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flcore.algorithms._sizes import WeighedLosses
from flcore.algorithms.base import check_number
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import Arrivals, Client, LocalResult, LocalWork, Payload, Server

__all__ = ["FedDyn"]


@dataclass(frozen=True, kw_only=True)
class FedDyn(WeighedLosses):
    r"""Dynamic regularisation (Acar et al., ICLR 2021, arXiv 2111.04263).

    Client i of m keeps :math:`h_i`, the server :math:`\bar h`, both 0 at first.  Clients minimise
    :math:`f_i(x) + \lambda \langle h_i, x \rangle + \frac{\lambda}{2} \|x - w^t\|^2`,

    .. math::
        x &\leftarrow x - \eta (\mathrm{clip}(g + \lambda (h_i - w^t)) + (\omega + \lambda) x) \\
        h_i &\leftarrow h_i + u_i, \qquad u_i = x - w^t \\
        \bar h &\leftarrow \bar h + \frac{1}{m} \sum_{S_t} u_i, \qquad
        w^{t+1} = w^t + \eta_g \Bigl( \frac{1}{S} \sum_{S_t} u_i + \bar h \Bigr) .

    In the paper's variables :math:`\nabla f_i = -\lambda h_i` and :math:`h = -\lambda \bar h`.

    Parameters
    ----------
    prox : float
        :math:`\lambda`, alpha in the paper; above 0.
    server_lr : float
        :math:`\eta_g`; 1 is the algorithm of the paper.
    weighting : {"uniform", "examples"}
        "examples": clients use :math:`\lambda_i = \lambda / (n_i / \bar n)`, as the authors' code
        does for clients of unequal size, which makes the sum over *examples* the objective.  Means
        over clients stay uniform.

    Notes
    -----
    ``hbar == mean of all h_i`` after every round, as long as updates arrive as they were sent.
    Statistics of the model (of BatchNorm) are averaged, not extrapolated.
    """

    name: ClassVar[str] = "feddyn"

    prox: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("prox", self.prox, lambda v: v > 0, "a number above 0")

    def server_begin(self, server: Server) -> None:
        """Start from hbar = 0."""
        server["dual"] = server.zeros()

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Tilt the loss by h_i, and pull towards w."""
        work = super().client_begin(payload, client)
        prox = self.prox / self.relative(client.examples, payload)
        q = prox * (client.keep("dual") - work.start)
        return replace(work, spec=self.spec(client.round, q=q, decay=prox))

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Renew h_i, send u_i."""
        client.state["dual"] = client.keep("dual") + result.update
        return super().client_end(result, client)

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Add the updates to hbar first, then move w along their mean and hbar."""
        server["dual"] = server["dual"] + len(arrivals) / server.population * mean
        direction = mean + server["dual"]
        still = server.layout.statistics
        direction[still] = mean[still]
        self.move(server, direction, self.server_lr)
