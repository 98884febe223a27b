"""FedSMOO: FedDyn, whose clients also agree on the direction of their ascent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from flcore.algorithms.base import check_number
from flcore.algorithms.feddyn import FedDyn
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import Arrivals, Client, LocalResult, LocalWork, Payload, Server
from flcore.algorithms.step import EPSILON, DualAscent

__all__ = ["FedSMOO"]


@dataclass(frozen=True, kw_only=True)
class FedSMOO(FedDyn):
    r"""Dynamic regularisation of model and perturbation (Sun et al., ICML 2023, arXiv 2305.11584).

    Beside FedDyn's :math:`h_i` client i keeps a dual :math:`\mu_i` of its perturbation, and the
    server a common one s, all 0 at first.  In every local step

    .. math::
        g_1 &= \nabla f_i(x) - \mu_i - s, \qquad e = \rho g_1 / (\|g_1\| + 10^{-7}), \qquad
        \mu_i \leftarrow \mu_i + e - s \\
        x &\leftarrow x - \eta (\mathrm{clip}(\nabla f_i(x + e) + \lambda (h_i - w^t))
            + (\omega + \lambda) x) ,

    and at the end of the round, with FedDyn's step of the server,

    .. math::
        s = \rho \bar\mu / (\|\bar\mu\| + 10^{-7}), \qquad
        \bar\mu = \frac{1}{S} \sum_{S_t} \mu_i .

    Parameters
    ----------
    rho : float
        Length of the ascent; 0 is FedDyn.

    Notes
    -----
    As in the authors' code, s leaves out a second term whose norm is small.  Clients send
    :math:`\mu_i` beside :math:`u_i`: twice the uplink of FedDyn.
    """

    name: ClassVar[str] = "fedsmoo"

    rho: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rho", self.rho, lambda v: v >= 0, "a number from 0")

    def server_begin(self, server: Server) -> None:
        """Start from s = 0."""
        super().server_begin(server)
        server["ascent"] = server.zeros()

    def downlink(self, server: Server, client: int) -> Payload:
        """Send w and s."""
        return super().downlink(server, client) | {"ascent": server["ascent"]}

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Take FedDyn's steps with an ascent whose dual goes along."""
        work = super().client_begin(payload, client)
        shift = DualAscent(self.rho, client.keep("ascent_dual").copy(), payload["ascent"])
        return replace(work, spec=replace(work.spec, shift=shift))

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Keep mu_i, and send it with u_i."""
        shift = result.work.spec.shift
        assert isinstance(shift, DualAscent)
        client.state["ascent_dual"] = shift.dual
        return super().client_end(result, client) | {"ascent_dual": shift.dual}

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Take FedDyn's step, and renew s."""
        super().server_step(server, mean, arrivals)
        dual = arrivals.mean(self.weights(arrivals), "ascent_dual")
        server["ascent"] = dual * (self.rho / (float(np.linalg.norm(dual)) + EPSILON))
